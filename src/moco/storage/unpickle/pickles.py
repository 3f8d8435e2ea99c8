"""A pickle interpreter that can create tensors, containers and plain values, and can call nothing else.

Python's `pickletools` decodes the instructions; none of Python's loading code is used. The file formats around the
pickles are read by torch itself: `torch.load` uses this module in place of `pickle`.
"""

import math
import pickletools
import sys
from collections.abc import Callable
from io import BufferedIOBase
from typing import IO, Any, NamedTuple, cast, final

import torch
from torch import Tensor

MOST_INSTRUCTIONS = 20_000_000
"""Most instructions in a pickle; the checkpoint of a large model has a few hundred thousand."""


@final
class StandIn:
    """Replaces an object that is not created from a file; it has no behaviour and keeps only the name."""

    def __init__(self, name: str = ""):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name or 'something'}, not loaded>"


class Maker(NamedTuple):
    """A function that a file may call."""

    make: Callable[..., Any]


class Unpickler:
    """The part of `pickle.Unpickler` that torch needs to derive its own class from.

    Args:
        file: file to read from; left positioned right after the pickle.
        encoding: passed by torch and not used; strings from Python 2 are ASCII in names of tensors.
    """

    def __init__(self, file: BufferedIOBase, *, encoding: str = "utf-8"):
        self._file = file
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}
        self.persistent_load: Callable[[Any], Any] = lambda identity: StandIn()

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name without importing anything; torch overrides this to find its storage classes in a table."""
        return KNOWN.get((module, name)) or StandIn(f"{module}.{name}")

    def load(self) -> Any:
        """Read the next pickle in the file and return its value."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], self._file))):
            if count > MOST_INSTRUCTIONS:
                raise ValueError("it has too many instructions")
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in LITERALS:
                self._stack.append(argument)
            else:
                self._do(opcode.name, argument)
        raise ValueError("it has no end")

    def _do(self, name: str, argument: Any) -> None:
        push, pop = self._stack.append, self._stack.pop
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "MARK":
                self._below.append(self._stack)
                self._stack = []
            case "POP":
                pop() if self._stack else self._above_mark()
            case "POP_MARK":
                self._above_mark()
            case "DUP":
                push(self._stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self._memo[argument])
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT" | "EMPTY_SET":
                push({"LIST": list, "TUPLE": tuple, "DICT": dict, "SET": set}[name.removeprefix("EMPTY_")]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(name[-1]))][::-1]))
            case "LIST" | "TUPLE" | "FROZENSET" | "DICT":
                items = self._above_mark()
                kind = {"LIST": list, "TUPLE": tuple, "FROZENSET": frozenset, "DICT": dict}[name]
                self._stack.append(kind(zip(items[::2], items[1::2], strict=True) if kind is dict else items))
            case "APPEND" | "APPENDS" | "ADDITEMS" | "SETITEM" | "SETITEMS":
                single = {"APPEND": 1, "SETITEM": 2}.get(name)
                items = [pop() for _ in range(single)][::-1] if single else self._above_mark()
                _add(self._stack[-1], items, pairs=name.startswith("SET"))
            case "GLOBAL":
                push(self.find_class(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = pop(), pop()
                push(self.find_class(str(module), str(attribute)))
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                if name == "NEWOBJ_EX":
                    pop()  # the keyword arguments, which no maker takes
                arguments, maker = pop(), pop()
                push(_call(maker, arguments))
            case "INST":
                arguments = tuple(self._above_mark())
                self._stack.append(_call(self.find_class(*argument.split(" ", 1)), arguments))
            case "OBJ":
                maker, *arguments = self._above_mark()
                self._stack.append(_call(maker, tuple(arguments)))
            case "BUILD":
                state = pop()
                if isinstance(self._stack[-1], Array | NumberType) and isinstance(state, tuple):
                    self._stack[-1].build(*state)
            case "BINPERSID" | "PERSID":
                push(self._storage(pop() if name == "BINPERSID" else argument))
            case _:
                raise ValueError(f"it has the unsupported instruction {name}")

    def _above_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _storage(self, identity: Any) -> Any:
        """Ask torch only for the bytes of tensors: for a saved class, it would look for the source code."""
        named = isinstance(identity, tuple) and identity[:1] in (("storage",), (b"storage",))
        return self.persistent_load(identity) if named else StandIn()


def load(file: BufferedIOBase, *, encoding: str = "utf-8") -> Any:
    """Do what torch needs of `pickle.load`."""
    return Unpickler(file, encoding=encoding).load()


def _call(maker: Any, arguments: Any) -> Any:
    if isinstance(maker, Maker) and isinstance(arguments, tuple):
        return maker.make(*arguments)
    return StandIn(maker.name if isinstance(maker, StandIn) else "")


def _add(container: Any, items: list[Any], *, pairs: bool) -> None:
    if pairs and isinstance(container, dict):
        container.update(zip(items[::2], items[1::2], strict=True))
    elif not pairs and isinstance(container, list):
        container.extend(items)
    elif not pairs and isinstance(container, set):
        container.update(items)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch._utils._rebuild_tensor(storage, offset, tuple(size), tuple(stride))


@final
class NumberType:
    """numpy's dtype, as far as numbers go."""

    def __init__(self, code: Any, *_: Any):
        self.code, self.big = str(code), str(code).startswith(">")

    def build(self, version: Any, order: Any = "", *_: Any) -> None:
        self.big = order == ">"

    def decode(self, raw: Any) -> Tensor | None:
        """Return the numbers in a row; None for what torch has no type for."""
        kind = NUMPY_TYPES.get(self.code.lstrip("<>|="))
        if kind is None or not isinstance(raw, bytes):
            return None
        if not raw:
            return torch.empty(0, dtype=kind)
        octets = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        if self.big:  # torch has the numbers of this machine only
            octets = octets.view(-1, kind.itemsize).flip(1) if sys.byteorder == "little" else octets
        return octets.reshape(-1).view(kind)


@final
class Array:
    """numpy's array, until it is known what is in it."""

    value: Any = None

    def __init__(self, *_: Any):
        self.value = StandIn("numpy.ndarray")

    def build(self, *state: Any) -> None:
        shape, number, fortran, raw = state[-4:]
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        numbers = number.decode(raw) if isinstance(number, NumberType) else None
        if numbers is not None and math.prod(shape) == len(numbers):
            turned = numbers.reshape(shape[::-1]).permute(*range(len(shape))[::-1]) if fortran else None
            self.value = numbers.reshape(shape) if turned is None else turned.contiguous()


def _scalar(number: Any, raw: Any = None) -> Any:
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    numbers = number.decode(raw) if isinstance(number, NumberType) else None
    return StandIn("numpy.scalar") if numbers is None else numbers.item()


def _encoded(text: Any, *_: Any) -> Any:
    """Bytes as written by protocol 2."""
    return text.encode("latin-1") if isinstance(text, str) else StandIn("_codecs.encode")


def plain(value: Any, done: dict[int, Any] | None = None) -> Any:
    """Convert numpy arrays in nested containers to tensors."""
    done = {} if done is None else done
    if isinstance(value, Array):
        return value.value
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value
    if isinstance(value, dict):
        value.update({key: plain(each, done) for key, each in value.items()})
    elif isinstance(value, list):
        value[:] = [plain(each, done) for each in value]
    elif type(value) is tuple:
        done[id(value)] = tuple(plain(each, done) for each in value)
    return done[id(value)]


LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
NUMPY_TYPES = {
    **{"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool, "u1": torch.uint8},
    **{"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64},
}


class _Bytes(NamedTuple):
    """Of torch's storages without a type, torch asks only this."""

    dtype: torch.dtype = torch.uint8


def _container(kind: type) -> Maker:
    return Maker(lambda items=(): kind(items))


_BUILTINS = ("builtins", "__builtin__")  # as Python 3 and 2 call it
KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): Maker(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Maker(_tensor),
    ("torch._utils", "_rebuild_parameter"): Maker(lambda data, *_: data),
    ("torch._utils", "_rebuild_parameter_with_state"): Maker(lambda data, *_: data),
    ("torch._tensor", "_rebuild_from_type_v2"): Maker(lambda maker, kind, arguments, *_: _call(maker, arguments)),
    ("torch", "Size"): Maker(lambda sizes=(): torch.Size(sizes)),
    ("torch", "device"): Maker(lambda kind, index=0: torch.device(str(kind), int(index))),
    ("torch.storage", "UntypedStorage"): _Bytes(),
    ("torch", "UntypedStorage"): _Bytes(),
    ("collections", "OrderedDict"): _container(dict),
    ("collections", "defaultdict"): Maker(lambda factory=None, items=(): dict(items)),
    ("_codecs", "encode"): Maker(_encoded),
    ("numpy", "dtype"): Maker(NumberType),
    **{("torch", name): kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)},
    **{
        (module, kind.__name__): _container(kind)
        for module in _BUILTINS
        for kind in (list, tuple, set, frozenset, dict)
    },
    **{(module, "bytes"): Maker(lambda *items: StandIn("bytes") if items else b"") for module in _BUILTINS},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Maker(Array) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): Maker(_scalar) for core in ("core", "_core")},
}
"""Everything that a file can refer to by name."""
