"""Reads pickles as trees of inert values: nothing that a pickle names is imported, looked up or called.

A pickle is a program for a stack machine (pickletools.dis prints it). This machine has the operations that build lists,
dictionaries, numbers and text. The operations that would import or call something only record what they would have
used: `Global`, `Made` and `Reference` are values without behaviour. Memory and time are bounded by the size of the
pickle and a maximum number of operations.
"""

import io
import pickletools
from collections.abc import Iterable
from typing import Any

_MAX_OPERATIONS = 10**6
_MAX_NAME = 200  # characters of a module's or a class's name; more are cut off
_UNSUPPORTED = {"PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NEW = {"EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_DICT": dict}
_PUSH_ARGUMENT = {
    operation.name
    for operation in pickletools.opcodes
    if operation.arg is not None and not operation.stack_before and len(operation.stack_after) == 1
} - {"GET", "BINGET", "LONG_BINGET", "GLOBAL", "PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"}
_MARK = object()


class UnsupportedError(ValueError):
    """The pickle is well-formed, but is not or cannot be read here; `names` are the classes and functions it uses."""

    def __init__(self, reason: str, names: Iterable[str] = ()):
        super().__init__(reason)
        self.names = frozenset(names)


class Global:
    """A class or function that the pickle names, such as 'collections.OrderedDict'; it is not looked up."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Made:
    """An object that the pickle makes by calling something, which is not called.

    Attributes:
        function: the name of what would be called; '' if it is none.
        arguments: what it would be called with.
        state: what would become its attributes, or None.
        items: what would be set by its keys; None if nothing is.
    """

    __slots__ = ("arguments", "function", "items", "state")

    def __init__(self, function: Any, arguments: Any):
        self.function = function.name if isinstance(function, Global) else ""
        self.arguments = arguments
        self.state = self.items = None


class Reference:
    """What the pickle says of data outside it (a persistent id)."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value


class Content:
    """One pickle.

    Attributes:
        value: made of None, bool, int, float, str, bytes, tuple, list (also for sets), dict with str as keys, and the
            classes above. It may contain itself.
        names: of all classes and functions in it.
        references: all of its references.
    """

    def __init__(self):
        self.value: Any = None
        self.names: set[str] = set()
        self.references: list[Reference] = []


def read(stream: io.BytesIO) -> Content:
    """The pickle that begins at the position of the stream, which is left at its end.

    Raises:
        UnsupportedError: it has more than a million operations, or some that no file of torch.save has.
        ValueError: it is corrupt or truncated.
    """
    machine = _Machine()
    try:
        for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if operation.name in _UNSUPPORTED or number == _MAX_OPERATIONS:
                reason = f"more than {_MAX_OPERATIONS:,} operations" if number == _MAX_OPERATIONS else operation.name
                raise UnsupportedError(f"its pickle has {reason}", {*machine.content.names, ""})
            machine.step(operation.name, argument)
    except UnsupportedError:
        raise
    except (ValueError, OverflowError, EOFError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"its pickle is corrupt or truncated ({type(error).__name__})") from error
    return machine.content


class _Machine:
    """The stack and the memo of a pickle; a method per kind of operation."""

    def __init__(self):
        self.content = Content()
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, Global] = {}  # one per name, so that a long name is kept once

    def step(self, name: str, argument: Any) -> None:
        """Carries out one operation; ValueError, IndexError or KeyError if the stack or the memo lack what it needs."""
        stack = self.stack
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name.endswith("PUT"):
            self.memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(self.memo[argument])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(self._popped(int(name[-1])))
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(self._marked())
        elif name == "DICT":
            items = self._marked()
            stack.append({})
            _set_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self._popped(1) if name == "APPEND" else self._marked()
            if type(stack[-1]) is list:
                stack[-1].extend(items)
            elif type(stack[-1]) is not Made:
                raise ValueError("items of what is no list")
        elif name in ("SETITEM", "SETITEMS"):
            items = self._popped(2) if name == "SETITEM" else self._marked()
            _set_items(stack[-1], items)
        elif name == "BINPERSID":
            stack.append(Reference(stack.pop()))
            self.content.references.append(stack[-1])
        elif name == "STOP":
            (self.content.value,) = stack
        elif name not in ("PROTO", "FRAME"):
            self._object(name, argument)

    def _object(self, name: str, argument: Any) -> None:
        """Carries out an operation that would import or call something."""
        stack = self.stack
        if name == "GLOBAL":
            stack.append(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._global(*self._popped(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(Made(*self._popped(2)))
        elif name == "NEWOBJ_EX":
            stack.append(Made(*self._popped(3)[:2]))
        elif name == "INST":
            arguments = tuple(self._marked())
            stack.append(Made(self._global(*argument.split(" ", 1)), arguments))
        elif name == "OBJ":
            function, *arguments = self._marked()
            stack.append(Made(function, tuple(arguments)))
        elif name == "BUILD":
            (state,) = self._popped(1)
            if type(stack[-1]) is not Made:
                raise ValueError("state of what has none")
            stack[-1].state = state
        else:
            raise ValueError(f"the operation {name}")

    def _global(self, module: Any, name: Any) -> Global:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is not text")
        name = f"{module[:_MAX_NAME]}.{name[:_MAX_NAME]}"
        self.content.names.add(name)
        return self.globals.setdefault(name, Global(name))

    def _popped(self, count: int) -> tuple[Any, ...]:
        """The uppermost values, removed from the stack."""
        values = tuple(self.stack[-count:])
        if len(values) < count or any(value is _MARK for value in values):
            raise ValueError("too few values")
        del self.stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        """The values above the uppermost mark, removed from the stack together with it."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]


def _set_items(target: Any, items: Iterable[Any]) -> None:
    """Sets keys and values, given in turn; keys become text, since arrays are named by them."""
    if type(target) is Made:
        target.items = {} if target.items is None else target.items
        target = target.items
    if type(target) is not dict:
        raise ValueError("items of what is no dictionary")
    items = list(items)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            short = type(key) in (bool, float) or key is None or (type(key) is int and abs(key) < 2**63)
            key = str(key) if short else f"<key {len(target)}>"
        target[key] = value
