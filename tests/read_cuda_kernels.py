"""Makes ``data/cuda_kernels_1_19_2.csv`` from the provider library of onnxruntime-training 1.19.2.

    python tests/read_cuda_kernels.py PATH_TO/libonnxruntime_providers_cuda.so

The library keeps no symbol names, and its kernels register themselves through one abstract class of
ONNX Runtime's, ``ProviderHost``. So the registration itself is run, in an x86-64 emulator (package
unicorn 2.1), with a host that is a table of empty functions whose calls are written down. Neither
CUDA nor a GPU is needed.
"""

from __future__ import annotations

import csv
import importlib
import pathlib
import struct
import sys
from collections.abc import Callable
from typing import Any

from cuda_kernels import COLUMNS, FLOATS, FLOATS8, INTEGERS, TABLE

# Functions of ProviderHost by their index in its table: the order is that of provider_interfaces.h,
# the place in 1.19.2 was told from the first kernel, MemcpyFromHost, and checked on Cast's types.
NEW_BUILDER, DELETE_BUILDER, NAME, DOMAIN, SINCE, RANGE = 311, 312, 313, 314, 315, 316
PROVIDER, TYPE, TYPES, HOST_INPUT, HOST_INPUTS, HOST_OUTPUT = 317, 318, 319, 320, 321, 322
BUILD, NEW_REGISTRY, REGISTER = 332, 333, 335
ELEMENT_TYPES = dict(enumerate(("bool", *INTEGERS, *FLOATS, *FLOATS8), start=363))
TYPE_LISTS = {  # AllFixedSizeTensorTypes and the other lists, in the groups of cuda_kernels
    405: "tensor",
    407: "tensor+float8",
    408: "tensor+string",
    411: "float+double+float16",
    412: "tensor+string+seq+seq(string)",
    414: "tensor+float8+string+seq+seq8+seq(string)",
    418: "tensor+seq",
    420: "tensor+float8+seq+seq8",
    424: "seq",
}
INITIALIZE = 6  # of the class Provider

# Addresses: one return instruction per import, one per host function, the host itself, and memory.
IMPORTS, HOST, END, TABLES, STACK, HEAP, LIBRARY = (
    *(0x10000, 0x20000, 0x2FFF0, 0x30000),
    *(0x100000, 0x1000000, 0x100000000),
)
RELATIVE, BY_SYMBOL = 8, (1, 6, 7)  # kinds of relocation
NOBITS, RELOCATIONS, DYNAMIC_SYMBOLS, INITIALIZERS = 8, 4, 11, 14  # kinds of section
GPU_CODE = 1 << 26  # bytes; a section of more isn't needed

NOTHING = (
    *("_ZdlPv", "_ZdlPvm", "_ZdaPv", "free", "__cxa_atexit", "_ZNSt8ios_base4InitC1Ev"),
    *("__cudaRegisterFatBinary", "__cudaRegisterFatBinaryEnd", "__cudaRegisterFunction"),
    *("__cudaRegisterVar",),
)


class Registration:
    """One run of the provider's registration.

    Attributes:
        rows: The kernels, as the rows of the table.
        registered: How many the provider handed to the registry.
    """

    def __init__(self, library: bytes) -> None:
        unicorn: Any = importlib.import_module("unicorn")
        self._x86: Any = importlib.import_module("unicorn.x86_const")
        self._uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self.rows: list[dict[str, str]] = []
        self.registered = 0
        self._builders: dict[int, dict[str, list[str]]] = {}
        self._type_names: dict[int, str] = {}
        self._heap = HEAP
        self._failure: Exception | None = None
        for start, size in ((IMPORTS, 1 << 18), (STACK, 1 << 20), (HEAP, 1 << 27)):
            self._uc.mem_map(start, size)
        self._uc.mem_write(IMPORTS, b"\xc3" * (TABLES - IMPORTS))
        self._put(TABLES, TABLES + 8, *(HOST + 16 * index for index in range(1000)))
        self._uc.reg_write(self._x86.UC_X86_REG_FS_BASE, STACK)  # where the stack's canary is read
        self._uc.hook_add(unicorn.UC_HOOK_CODE, self._enter, begin=IMPORTS, end=END - 1)
        initializers, get_provider = self._load(library)
        for address in initializers:
            try:
                self._call(address)
            except unicorn.UcError as error:  # one: the file system library wants a real iostream
                print(f"initialiser {address - LIBRARY:#x} left out: {error}", file=sys.stderr)
        provider = self._call(get_provider)
        self._call(self._get(self._get(provider) + 8 * INITIALIZE), provider)

    def _load(self, library: bytes) -> tuple[list[int], int]:
        """Maps and relocates the library.

        Returns:
            The addresses of its initialisers and of GetProvider.
        """
        (table,) = struct.unpack_from("<Q", library, 40)
        (count,) = struct.unpack_from("<H", library, 60)
        sections = [
            struct.unpack_from("<IIQQQQIIQQ", library, table + 64 * n) for n in range(count)
        ]
        self._uc.mem_map(LIBRARY, -(-max(s[3] + s[5] for s in sections) // 4096) * 4096)
        contents = []
        for _, kind, flags, address, offset, size, *_ in sections:
            empty = kind == NOBITS or size > GPU_CODE
            contents.append(b"" if empty else library[offset : offset + size])
            if flags & 2:
                self._uc.mem_write(LIBRARY + address, contents[-1])
        kinds = [section[1] for section in sections]
        at = kinds.index(DYNAMIC_SYMBOLS)
        symbols = list(struct.iter_unpack("<IBBHQQ", contents[at]))
        strings = contents[sections[at][6]]
        self._names = [strings[s[0] : strings.index(0, s[0])].decode() for s in symbols]
        places = [LIBRARY + s[4] if s[3] else IMPORTS + 16 * n for n, s in enumerate(symbols)]
        for kind, content in zip(kinds, contents, strict=True):
            if kind != RELOCATIONS:
                continue
            for place, info, addend in struct.iter_unpack("<QQq", content):
                if info & 0xFFFFFFFF == RELATIVE:
                    self._put(LIBRARY + place, LIBRARY + addend)
                elif info & 0xFFFFFFFF in BY_SYMBOL:
                    self._put(LIBRARY + place, places[info >> 32] + addend)
        start, size = (sections[kinds.index(INITIALIZERS)][n] for n in (3, 5))
        initializers = [self._get(LIBRARY + start + n) for n in range(0, size, 8)]
        return initializers, places[self._names.index("GetProvider")]

    def _call(self, function: int, argument: int = 0) -> int:
        self._put(STACK + 0xF0000, END)  # where to return to
        self._uc.reg_write(self._x86.UC_X86_REG_RSP, STACK + 0xF0000)
        self._uc.reg_write(self._x86.UC_X86_REG_RDI, argument)
        self._uc.emu_start(function, END)
        if self._failure:
            raise self._failure
        return int(self._uc.reg_read(self._x86.UC_X86_REG_RAX))

    def _enter(self, _uc: object, address: int, _size: int, _data: object) -> None:
        """Answers a call that leaves the library."""
        arguments = [
            int(self._uc.reg_read(getattr(self._x86, f"UC_X86_REG_{name}")))
            for name in ("RDI", "RSI", "RDX", "RCX")
        ]
        try:
            if address >= HOST:
                result = self._host((address - HOST) // 16, arguments)
            else:
                result = self._import(self._names[(address - IMPORTS) // 16], arguments)
        except Exception as error:  # it may not pass through the emulator's C code
            self._failure = error
            self._uc.emu_stop()
        else:
            self._uc.reg_write(self._x86.UC_X86_REG_RAX, result & (1 << 64) - 1)

    def _import(self, name: str, arguments: list[int]) -> int:
        """Stands in for the few functions of C, C++ and CUDA that the registration calls."""
        first, second, third, _ = arguments
        memory = self._uc.mem_read
        answers: dict[str, Callable[[], int]] = {
            "Provider_GetHost": lambda: TABLES,
            "_Znwm": lambda: self._new(first),
            "malloc": lambda: self._new(first),
            "memcpy": lambda: self._write(first, bytes(memory(second, third))),
            "memmove": lambda: self._write(first, bytes(memory(second, third))),
            "memset": lambda: self._write(first, bytes([second & 255]) * third),
            "strlen": lambda: len(self._string(first)),
            "__cxa_guard_acquire": lambda: int(memory(first, 1)[0] == 0),
            "__cxa_guard_release": lambda: self._write(first, b"\1"),
        }
        if name in answers:
            return answers[name]()
        if name.startswith("_ZSt") or name in {"abort", "exit", "__cxa_throw"}:
            raise RuntimeError(f"the library calls {name}")
        if name not in NOTHING:
            print(f"{name} does nothing", file=sys.stderr)
        return 0

    def _host(self, index: int, arguments: list[int]) -> int:
        """Stands in for ProviderHost; an object it returns is at the first argument."""
        first, second, third, fourth = arguments
        if index in {NEW_BUILDER, BUILD, NEW_REGISTRY}:
            new = self._new(64)
            self._put(first, new, *([0] if index == NEW_REGISTRY else []))
            if index == NEW_BUILDER:
                self._builders[new] = {column: [] for column in COLUMNS}
            elif index == BUILD:
                self._add_row(self._builders[third])
            return first
        if index == REGISTER:
            self.registered += 1
            return self._write(first, bytes(8))  # a status of success
        if index in ELEMENT_TYPES:
            return self._type(ELEMENT_TYPES[index])
        if index in TYPE_LISTS:
            place = self._new(32)
            self._put(place, place + 24, place + 32, place + 32, self._type(TYPE_LISTS[index]))
            return place
        definition = self._builders.get(second)
        if definition is None:
            return self._new(64)
        if index in {NAME, DOMAIN}:
            definition["op" if index == NAME else "domain"] = [self._string(third)]
        elif index in {SINCE, RANGE}:
            definition["since_version"] = [str(third & 0xFFFFFFFF)]
            definition["end_version"] = [str(fourth & 0xFFFFFFFF)] if index == RANGE else []
        elif index in {TYPE, TYPES}:
            types = [fourth] if index == TYPE else self._vector(fourth, 8)
            allowed = "+".join(self._type_names[type_] for type_ in types)
            definition["types"].append(f"{self._string(third)}={allowed}")
        elif index in {HOST_INPUT, HOST_INPUTS, HOST_OUTPUT} and third & 0x80000000:
            # -2 and -1 are host memory, 0 the device's
            some = self._vector(fourth, 4) if index == HOST_INPUTS else [fourth & 0xFFFFFFFF]
            column = "host_outputs" if index == HOST_OUTPUT else "host_inputs"
            definition[column] += map(str, some)
        return 0

    def _add_row(self, definition: dict[str, list[str]]) -> None:
        separators = {"types": ";"}
        row = {name: separators.get(name, " ").join(definition[name]) for name in COLUMNS}
        self.rows.append(row)

    def _type(self, name: str) -> int:
        place = self._new(16)
        self._type_names[place] = name
        return place

    def _new(self, size: int) -> int:
        place = self._heap
        self._heap += -(-size // 16) * 16 + 16
        return place

    def _write(self, address: int, data: bytes) -> int:
        self._uc.mem_write(address, data)
        return address

    def _put(self, address: int, *words: int) -> None:
        self._write(address, struct.pack(f"<{len(words)}Q", *words))

    def _get(self, address: int) -> int:
        return int.from_bytes(self._uc.mem_read(address, 8), "little")

    def _vector(self, address: int, size: int) -> list[int]:
        begin, end = self._get(address), self._get(address + 8)
        data = bytes(self._uc.mem_read(begin, end - begin))
        return [int.from_bytes(data[n : n + size], "little") for n in range(0, len(data), size)]

    def _string(self, address: int) -> str:
        data = b""
        while b"\0" not in data:
            data += bytes(self._uc.mem_read(address + len(data), 1))
        return data[:-1].decode()


def main(path: str) -> None:
    """Rewrites the table from the library at ``path``."""
    registration = Registration(pathlib.Path(path).read_bytes())
    if not registration.rows or len(registration.rows) != registration.registered:
        raise RuntimeError(f"{len(registration.rows)=}, {registration.registered=}")
    rows = sorted(
        registration.rows,
        key=lambda row: (row["domain"], row["op"], int(row["since_version"]), *row.values()),
    )
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1])
