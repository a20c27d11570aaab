// Trains both arms in ONNX Runtime Web, draws their curves, and saves the trained tensors.
const parameters = new URLSearchParams(location.search);
const provider = parameters.get("provider") ?? "wasm"; // or webgpu
const ort = await import(`./node_modules/onnxruntime-web/dist/ort.${provider}.min.mjs`);

ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
ort.env.logLevel = "error";

const BATCH = 64;
const epochs = Number(parameters.get("epochs") ?? 10);
const TYPES = { F32: ["float32", Float32Array], I64: ["int64", BigInt64Array] };

const bytes = async (path) => new Uint8Array(await (await fetch(path)).arrayBuffer());

function readTensors(file) {
  const view = new DataView(file.buffer);
  const start = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(file.subarray(8, start)));
  delete header.__metadata__;
  return Object.fromEntries(
    Object.entries(header).map(([name, { dtype, shape, data_offsets: [from, to] }]) => {
      const [type, List] = TYPES[dtype];
      const data = new List(file.buffer.slice(start + from, start + to));
      return [name, new ort.Tensor(type, data, shape)];
    }),
  );
}

function writeTensors(tensors) {
  const header = {};
  let end = 0;
  for (const [name, { type, dims, data }] of Object.entries(tensors)) {
    const dtype = type === "float32" ? "F32" : "I64";
    header[name] = { dtype, shape: [...dims], data_offsets: [end, (end += data.byteLength)] };
  }
  let text = JSON.stringify(header);
  text = text.padEnd(Math.ceil(text.length / 8) * 8);
  const length = new BigUint64Array([BigInt(text.length)]);
  return new Blob([length, text, ...Object.values(tensors).map(({ data }) => data)]);
}

const scalar = (type, value) =>
  new ort.Tensor(type, type === "int64" ? BigInt64Array.of(value) : Float32Array.of(value), []);

class Arm {
  static async load(name) {
    const arm = new Arm();
    arm.name = name;
    arm.manifest = await (await fetch(`${name}/manifest.json`)).json();
    arm.model = readTensors(await bytes(`${name}/model.safetensors`));
    arm.state = { ...arm.model, ...readTensors(await bytes(`${name}/optimizer.safetensors`)) };
    const session = async (file) =>
      ort.InferenceSession.create(await bytes(`${name}/${file}`), { executionProviders: [provider] });
    arm.training = await session("training_model.onnx");
    arm.evaluation = await session("eval_model.onnx");
    Object.assign(arm, { step: 0, losses: [], accuracies: [], times: [] });
    return arm;
  }

  feeds(session, images, labels, others = {}) {
    const [input, target] = [this.manifest.inputs[0].name, this.manifest.targets[0].name];
    const given = { ...this.state, ...others, [input]: images, [target]: labels };
    const names = session.inputNames.filter((name) => name in given); // λ has a value of its own
    return Object.fromEntries(names.map((name) => [name, given[name]]));
  }

  async train(images, labels) {
    const others = {
      learning_rate: scalar("float32", this.manifest.optimizer.lr),
      step: scalar("int64", BigInt(this.step)),
    };
    const start = performance.now();
    const found = await this.training.run(this.feeds(this.training, images, labels, others));
    this.times.push(performance.now() - start);
    const [loss, ...rest] = this.training.outputNames;
    for (const name of rest) this.state[name.replace(/_new$/, "")] = found[name];
    this.losses.push(found[loss].data[0]);
    this.step += 1;
  }

  async evaluate({ images, labels }) {
    const found = await this.evaluation.run(this.feeds(this.evaluation, images, labels));
    const scores = found[this.evaluation.outputNames[1]];
    const [count, classes] = scores.dims;
    let right = 0;
    for (let i = 0; i < count; i++) {
      const row = scores.data.subarray(i * classes, (i + 1) * classes);
      right += Number(row.indexOf(Math.max(...row)) === Number(labels.data[i]));
    }
    this.accuracies.push((100 * right) / count);
  }

  get weights() {
    const counters = Object.entries(this.manifest.counters).map(([name, value]) => [
      name,
      scalar("int64", BigInt(value + this.step * (this.manifest.counter_steps[name] ?? 1))),
    ]);
    const names = Object.keys(this.model);
    const trained = Object.fromEntries(names.map((name) => [name, this.state[name]]));
    return { ...trained, ...Object.fromEntries(counters) };
  }
}

function split(tensors, kind) {
  const images = tensors[`${kind}.images`];
  const labels = tensors[`${kind}.labels`];
  const size = images.data.length / images.dims[0];
  const pick = (order) => ({
    images: new ort.Tensor(
      "float32",
      Float32Array.from(order.flatMap((i) => [...images.data.subarray(i * size, (i + 1) * size)])),
      [order.length, ...images.dims.slice(1)],
    ),
    labels: new ort.Tensor("int64", BigInt64Array.from(order, (i) => labels.data[i]), [order.length]),
  });
  return { count: images.dims[0], pick, all: { images, labels } };
}

function shuffled(count, seed) {
  const order = Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    const j = seed % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

const canvas = document.querySelector("canvas");
const COLOURS = { plain: "#b45309", tract: "#1d4ed8" };

function draw(arms, steps) {
  const to = canvas.getContext("2d");
  to.clearRect(0, 0, canvas.width, canvas.height);
  to.font = "16px system-ui, sans-serif";
  const panels = [
    ["training loss by step (log)", (arm) => smoothed(arm.losses).map(Math.log10), steps],
    ["test accuracy by epoch (%)", (arm) => arm.accuracies, epochs],
  ];
  panels.forEach(([title, values, length], panel) => {
    const [left, top, width, height] = [60 + panel * 440, 40, 360, 330];
    const every = arms.flatMap(values);
    const [low, high] = [Math.min(...every), Math.max(...every)];
    const y = (value) => top + height - ((value - low) / (high - low || 1)) * height;
    to.strokeStyle = "#999";
    to.strokeRect(left, top, width, height);
    to.fillStyle = "#222";
    to.fillText(title, left, top - 12);
    for (const value of [low, high]) {
      const shown = panel ? value.toFixed(0) : (10 ** value).toPrecision(2);
      to.fillText(shown, left - 52, y(value) + 5);
    }
    for (const arm of arms) {
      to.strokeStyle = COLOURS[arm.name];
      to.lineWidth = 2;
      to.beginPath();
      values(arm).forEach((value, i) => to.lineTo(left + (i / length) * width, y(value)));
      to.stroke();
    }
  });
}

const smoothed = (values) =>
  values.map((_, i) => {
    const near = values.slice(Math.max(0, i - 9), i + 1);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });

const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1] ?? 0;

function tell(arm) {
  const cells = [
    arm.name === "tract" ? "TrAct" : "plain",
    arm.accuracies.length - 1,
    (smoothed(arm.losses).at(-1) ?? 0).toPrecision(3),
    `${arm.accuracies.at(-1).toFixed(2)} %`,
    median(arm.times).toFixed(2),
  ];
  document.getElementById(arm.name).innerHTML = cells.map((cell) => `<td>${cell}</td>`).join("");
}

async function main() {
  const state = document.getElementById("state");
  const digits = readTensors(await bytes("digits.safetensors"));
  const [train, test] = ["train", "test"].map((kind) => split(digits, kind));
  const arms = [await Arm.load("plain"), await Arm.load("tract")];
  const perEpoch = Number(parameters.get("steps") ?? Math.floor(train.count / BATCH));
  for (const arm of arms) await arm.evaluate(test.all);
  for (let epoch = 0; epoch < epochs; epoch++) {
    const order = shuffled(train.count, epoch + 1);
    for (let i = 0; i < perEpoch; i++) {
      const { images, labels } = train.pick(order.slice(i * BATCH, (i + 1) * BATCH));
      for (const arm of arms) await arm.train(images, labels);
      if (i % 5 === 0) {
        draw(arms, epochs * perEpoch);
        state.textContent = `epoch ${epoch + 1} of ${epochs}`;
        await new Promise(requestAnimationFrame);
      }
    }
    for (const arm of arms) await arm.evaluate(test.all);
    arms.forEach(tell);
    draw(arms, epochs * perEpoch);
  }
  state.textContent = "done";
  const save = document.getElementById("save");
  save.disabled = false;
  save.onclick = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(writeTensors(arms[1].weights));
    link.download = "model.safetensors";
    link.click();
  };
  const { losses, accuracies } = arms[1];
  const result = { losses, accuracies, plain: arms[0].losses, plainAccuracies: arms[0].accuracies };
  if (parameters.has("report")) {
    await fetch("weights", { method: "POST", body: writeTensors(arms[1].weights) });
    await fetch("result", { method: "POST", body: JSON.stringify(result) });
  }
}

main().catch((error) => {
  document.getElementById("state").textContent = `${error}`;
  if (parameters.has("report")) {
    fetch("result", { method: "POST", body: JSON.stringify({ error: `${error.stack}` }) });
  }
});
