"""Take a scikit-learn classifier to ONNX, train it on with TrAct, and hand the weights back.

Needs the extra `test`.
"""

import _named_extra  # noqa: F401  # isort: skip

import tempfile

import numpy as np
from skl2onnx import to_onnx
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import scale

from tract_fx import SGD, export_training, load_trainer

images, labels = load_digits(return_X_y=True)
images = scale(images).astype(np.float32)
classifier = MLPClassifier((32,), random_state=0).partial_fit(images, labels, classes=range(10))
model = to_onnx(classifier, images[:1])  # ends in a softmax: the loss is put in front of it
optimizer = SGD(lr=0.1, momentum=0.9)
with tempfile.TemporaryDirectory() as scratch:
    export_training(model, images, f"{scratch}/plain", optimizer=optimizer, plain=True)
    print(export_training(model, images, f"{scratch}/tract", optimizer=optimizer, lambda_=0.1))
    plain, trainer = load_trainer(f"{scratch}/plain"), load_trainer(f"{scratch}/tract")

# X meets W from the left here, and so does the preconditioner: (XᵀX/R + λI)⁻¹ gW.
damped_gram = images.T @ images / len(images) + 0.1 * np.eye(64)
before, after = (t.compute_gradients(images, labels)["coefficient"] for t in (plain, trainer))
np.testing.assert_allclose(after, np.linalg.solve(damped_gram, before), rtol=1e-3, atol=1e-6)

losses = [trainer.train_step(images, labels) for _ in range(30)]
state = {name: tensor.numpy() for name, tensor in trainer.state_dict().items()}
classifier.coefs_ = [state["coefficient"], state["coefficient1"]]
classifier.intercepts_ = [state["intercepts"][0], state["intercepts1"][0]]
_, probabilities = trainer.predict(images)
np.testing.assert_allclose(classifier.predict_proba(images), probabilities, rtol=1e-3, atol=1e-5)
assert losses[-1] < losses[0] / 5
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {classifier.score(images, labels):.1%}")
