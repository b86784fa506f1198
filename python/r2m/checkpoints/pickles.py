"""Pickles read as data: nothing that one names is imported, called, hashed or walked through.

An opcode takes what it consumes from the stack and leaves one value, whatever it says, so that memory and time are
bounded by the number of opcodes and bytes however deep values are nested. What names, calls and stored objects mean is
asked of who reads.

Reference: ``pickletools`` of Python. Opcodes in text, of protocol 0, are not read: nobody's weights have them.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any, Protocol

_MOST_OPCODES = 10**7  # of one pickle: a quarter of a million tensors


class Refused(ValueError):
    """A pickle that is not read: damaged, too long, or with a program in it.

    Attributes:
        program: the name of what would be run; empty where it is something else.
        damaged: whether it ends too early, or is none.
    """

    def __init__(self, reason: str, program: str = "", *, damaged: bool = False) -> None:
        super().__init__(reason)
        self.program, self.damaged = program, damaged


class Meaning(Protocol):
    """What names in a pickle stand for; a :class:`TypeError` and its like say that the pickle is damaged."""

    def named(self, module: str, name: str) -> Any:
        """Of a function or a class, by its module and name."""
        ...

    def called(self, function: Any, arguments: Any) -> Any:
        """Of a call of what was named."""
        ...

    def stored(self, identity: Any) -> Any:
        """Of an object that lies elsewhere in the file."""
        ...


def read(content: bytes, meaning: Meaning, at: int = 0) -> tuple[Any, int]:
    """The value of a pickle, and where it ends.

    Mappings are dictionaries, without what stands under keys that are neither text nor number; sets are lists.

    Args:
        content: of bounded length.
        meaning: of what it names.
        at: where it begins.

    Raises:
        Refused: it cannot or must not be read.
    """
    machine, stop = _Machine(content, meaning), pickle.STOP[0]
    try:
        for _ in range(_MOST_OPCODES):
            code = content[at]
            if code == stop:
                return machine.stack.pop(), at + 1
            at = _OPCODES[code](machine, at + 1)
    except Refused:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise Refused("is damaged", damaged=True) from error
    raise Refused(
        f"has more than {_MOST_OPCODES} opcodes, as a quarter of a million tensors have; expected fewer, or safetensors"
    )


class _Machine:
    def __init__(self, content: bytes, meaning: Meaning) -> None:
        self.content, self.meaning = content, meaning
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def taken(self, at: int, count: int) -> bytes:
        """Bytes of the content."""
        if at + count > len(self.content):
            raise IndexError
        return self.content[at : at + count]

    def marked(self) -> list[Any]:
        """What lies above the last mark, taken from the stack."""
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values


def put(mapping: Any, key: Any, value: Any) -> None:
    """An entry of a dictionary. Other keys could be made such that it takes for ever to hash them."""
    if isinstance(mapping, dict) and (key is None or isinstance(key, str | int | float | bytes)):
        mapping[key] = value


# What an opcode does to a machine, given where its argument begins; it returns where the next one is.
_Opcode = Callable[[_Machine, int], int]
_OPCODES: dict[int, _Opcode] = {}


def _opcode(*codes: bytes) -> Callable[[_Opcode], _Opcode]:
    def declared(function: _Opcode) -> _Opcode:
        _OPCODES.update({code[0]: function for code in codes})
        return function

    return declared


def _constant(code: bytes, value: Any) -> None:
    def push(machine: _Machine, at: int) -> int:
        machine.stack.append(value)
        return at

    _OPCODES[code[0]] = push


def _empty(code: bytes, kind: Callable[[], Any]) -> None:
    def push(machine: _Machine, at: int) -> int:
        machine.stack.append(kind())
        return at

    _OPCODES[code[0]] = push


def _number(code: bytes, form: str) -> None:
    unpack, size = struct.Struct(form).unpack_from, struct.calcsize(form)

    def push(machine: _Machine, at: int) -> int:
        machine.stack.append(unpack(machine.content, at)[0])
        return at + size

    _OPCODES[code[0]] = push


def _counted(code: bytes, form: str, made: Callable[[bytes], Any]) -> None:
    """An argument with its length before it."""
    unpack, size = struct.Struct(form).unpack_from, struct.calcsize(form)

    def push(machine: _Machine, at: int) -> int:
        count: int = unpack(machine.content, at)[0]
        machine.stack.append(made(machine.taken(at + size, count)))
        return at + size + count

    _OPCODES[code[0]] = push


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def _text_of_python_2(content: bytes) -> str:
    return content.decode("latin1")


def _whole(content: bytes) -> int:
    return int.from_bytes(content, "little", signed=True)


for _code, _value in ((pickle.NONE, None), (pickle.NEWTRUE, True), (pickle.NEWFALSE, False), (pickle.EMPTY_TUPLE, ())):
    _constant(_code, _value)
for _code, _kind in ((pickle.EMPTY_DICT, dict), (pickle.EMPTY_LIST, list), (pickle.EMPTY_SET, list)):
    _empty(_code, _kind)
for _code, _form in ((pickle.BININT, "<i"), (pickle.BININT1, "<B"), (pickle.BININT2, "<H"), (pickle.BINFLOAT, ">d")):
    _number(_code, _form)
for _code, _form, _made in (
    (pickle.BINUNICODE, "<I", _text),
    (pickle.SHORT_BINUNICODE, "<B", _text),
    (pickle.BINUNICODE8, "<Q", _text),
    (pickle.BINSTRING, "<I", _text_of_python_2),
    (pickle.SHORT_BINSTRING, "<B", _text_of_python_2),
    (pickle.BINBYTES, "<I", bytes),
    (pickle.SHORT_BINBYTES, "<B", bytes),
    (pickle.BINBYTES8, "<Q", bytes),
    (pickle.BYTEARRAY8, "<Q", bytes),
    (pickle.LONG1, "<B", _whole),
    (pickle.LONG4, "<I", _whole),
):
    _counted(_code, _form, _made)


@_opcode(pickle.PROTO)
def _proto(machine: _Machine, at: int) -> int:
    return at + 1


@_opcode(pickle.FRAME)
def _frame(machine: _Machine, at: int) -> int:
    return at + 8


@_opcode(pickle.BINPUT)
def _binput(machine: _Machine, at: int) -> int:
    machine.memo[machine.content[at]] = machine.stack[-1]
    return at + 1


@_opcode(pickle.LONG_BINPUT)
def _long_binput(machine: _Machine, at: int) -> int:
    machine.memo[int.from_bytes(machine.taken(at, 4), "little")] = machine.stack[-1]
    return at + 4


@_opcode(pickle.MEMOIZE)
def _memoize(machine: _Machine, at: int) -> int:
    machine.memo[len(machine.memo)] = machine.stack[-1]
    return at


@_opcode(pickle.BINGET)
def _binget(machine: _Machine, at: int) -> int:
    machine.stack.append(machine.memo[machine.content[at]])
    return at + 1


@_opcode(pickle.LONG_BINGET)
def _long_binget(machine: _Machine, at: int) -> int:
    machine.stack.append(machine.memo[int.from_bytes(machine.taken(at, 4), "little")])
    return at + 4


@_opcode(pickle.MARK)
def _mark(machine: _Machine, at: int) -> int:
    machine.marks.append(len(machine.stack))
    return at


@_opcode(pickle.POP)
def _pop(machine: _Machine, at: int) -> int:
    machine.stack.pop()
    return at


@_opcode(pickle.POP_MARK)
def _pop_mark(machine: _Machine, at: int) -> int:
    machine.marked()
    return at


@_opcode(pickle.DUP)
def _dup(machine: _Machine, at: int) -> int:
    machine.stack.append(machine.stack[-1])
    return at


@_opcode(pickle.TUPLE, pickle.FROZENSET)
def _tuple(machine: _Machine, at: int) -> int:
    machine.stack.append(tuple(machine.marked()))
    return at


@_opcode(pickle.TUPLE1)
def _tuple1(machine: _Machine, at: int) -> int:
    machine.stack[-1:] = [(machine.stack[-1],)]
    return at


@_opcode(pickle.TUPLE2)
def _tuple2(machine: _Machine, at: int) -> int:
    machine.stack[-2:] = [(machine.stack[-2], machine.stack[-1])]
    return at


@_opcode(pickle.TUPLE3)
def _tuple3(machine: _Machine, at: int) -> int:
    machine.stack[-3:] = [(machine.stack[-3], machine.stack[-2], machine.stack[-1])]
    return at


@_opcode(pickle.APPEND)
def _append(machine: _Machine, at: int) -> int:
    value = machine.stack.pop()
    if isinstance(machine.stack[-1], list):
        machine.stack[-1].append(value)
    return at


@_opcode(pickle.APPENDS, pickle.ADDITEMS)
def _appends(machine: _Machine, at: int) -> int:
    values = machine.marked()
    if isinstance(machine.stack[-1], list):
        machine.stack[-1].extend(values)
    return at


@_opcode(pickle.SETITEM)
def _setitem(machine: _Machine, at: int) -> int:
    value, key = machine.stack.pop(), machine.stack.pop()
    put(machine.stack[-1], key, value)
    return at


@_opcode(pickle.SETITEMS)
def _setitems(machine: _Machine, at: int) -> int:
    values = machine.marked()
    for key, value in zip(values[::2], values[1::2], strict=True):
        put(machine.stack[-1], key, value)
    return at


@_opcode(pickle.GLOBAL)
def _global(machine: _Machine, at: int) -> int:
    middle = machine.content.index(b"\n", at)
    end = machine.content.index(b"\n", middle + 1)
    machine.stack.append(
        machine.meaning.named(_text(machine.content[at:middle]), _text(machine.content[middle + 1 : end]))
    )
    return end + 1


@_opcode(pickle.STACK_GLOBAL)
def _stack_global(machine: _Machine, at: int) -> int:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.meaning.named(str.__str__(module), str.__str__(name)))
    return at


@_opcode(pickle.REDUCE, pickle.NEWOBJ)
def _reduce(machine: _Machine, at: int) -> int:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.meaning.called(function, arguments))
    return at


@_opcode(pickle.BUILD)
def _build(machine: _Machine, at: int) -> int:
    machine.stack.pop()  # attributes: of a state dict, its versions
    return at


@_opcode(pickle.BINPERSID)
def _binpersid(machine: _Machine, at: int) -> int:
    machine.stack.append(machine.meaning.stored(machine.stack.pop()))
    return at
