"""Reads a pickle as data: an interpreter of pickle's instructions that can run nothing.

A pickle is a program for a small stack machine. Python's own machine can be told which names to
refuse, but not to bound memory (a memo index of 2**32 - 1 makes it ask for gigabytes) or time
(hashing a tuple nested in itself forty times never ends, hashing one nested a million deep kills
the process); the instructions would have to be read twice, once to judge them. Reading them once
with a machine of our own is shorter and takes no longer (ConViT-B has 7,127 instructions):

- the instructions are those that PyTorch's files have had since 2016 (protocols 2 to 5, and the
  strings of Python 2); any other is refused by name;
- a name is looked up in a table given by the caller (allowed.py), never imported, and what it
  stands for is our own code that checks its arguments;
- dictionary keys and set members are plain scalars, so hashing is cheap and cannot be made to collide;
- the number of instructions, and what calls copy, are bounded by constants and by the file's size.
"""

import math
import pickletools
import struct
from dataclasses import dataclass

from convit_jax.errors import UserError

MAX_INSTRUCTIONS = 2_000_000  # a ConViT's training checkpoint, with optimizer and EMA, has some 30,000
MAX_LINE = 256  # of a module's or a class's name

NAMES = {ord(op.code): op.name for op in pickletools.opcodes}


@dataclass(frozen=True)
class Call:
    """A name of the pickle that may be called: our function of the same meaning."""

    name: str
    function: object


def quoted(value):
    """Something from the file as it may be printed: short, ASCII only, and no walk through containers."""
    if isinstance(value, (str, bytes)):
        return ascii(value) if len(value) <= 100 else f"{ascii(value[:97])[:-1]}...{ascii('')[0]}"
    return ascii(value) if type(value) in (int, float, bool, type(None)) else f"a {type(value).__name__}"


def check_key(key):
    """Return a dictionary key or a set's member if it is a plain scalar, else raise UserError."""
    if type(key) in (str, bytes, bool, type(None)):
        return key
    if (type(key) is int and abs(key) < 2**60) or (type(key) is float and math.isfinite(key)):
        return key
    raise UserError(f"its pickle uses a {type(key).__name__} as a dictionary key or a set's member.")


class Unpickler:
    """Interprets one pickle after another from a stream.

    Args:
      stream: a binary file, at the pickle's first byte.
      length: how many bytes may be read from it.
      find: (module, name) -> value or Call; raises UserError for what it does not know.
      persistent: (id) -> value, for what the pickle keeps elsewhere.
    """

    def __init__(self, stream, length, find, persistent):
        self.stream, self.left = stream, length
        self.find, self.persistent = find, persistent
        self.instructions = MAX_INSTRUCTIONS
        self.copied = length + 2**20  # bytes of text that calls may still copy
        self.actions = {
            code: getattr(self, f"op_{name.lower()}")
            for code, name in NAMES.items()
            if hasattr(self, f"op_{name.lower()}")
        }

    def load(self):
        """The next object of the stream.

        Raises:
          UserError: the pickle is damaged, too large, or wants something that is not data.
        """
        self.stack, self.outer, self.memo = [], [], {}
        actions, code = self.actions, None
        try:
            while True:
                self.spend(1)
                code = self.take(1)[0]
                if code == 0x2E:  # STOP
                    return self.stack.pop()
                if code not in actions:
                    self.refuse(code)
                actions[code]()
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
            raise UserError(f"its pickle is damaged ({NAMES[code]} with wrong arguments).") from error

    def refuse(self, code):
        if code not in NAMES:
            raise UserError(f"its pickle is damaged (there is no instruction 0x{code:02x}).")
        raise UserError(f"its pickle has the instruction {NAMES[code]}, which PyTorch never writes.")

    def spend(self, instructions):
        self.instructions -= instructions
        if self.instructions < 0:
            raise UserError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions or elements.")

    def take(self, count):
        if count > self.left:
            raise UserError("its pickle is cut off, or declares more bytes than the file has.")
        self.left -= count
        data = self.stream.read(count)
        if len(data) != count:
            raise UserError("its pickle is cut off.")
        return data

    def number(self, layout):
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self):
        line = self.stream.readline(min(MAX_LINE, self.left))
        self.left -= len(line)
        if not line.endswith(b"\n"):
            raise UserError("its pickle is cut off or damaged (a name has no end).")
        return line[:-1].decode()

    def items(self):
        """The stack down to the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    # The instructions, by their names in pickletools.

    def op_proto(self):
        if (version := self.number("B")) > 5:
            raise UserError(f"its pickle has protocol {version}; 5 is the newest known.")

    def op_frame(self):
        if self.number("<Q") > self.left:
            raise UserError("its pickle is cut off, or declares more bytes than the file has.")

    def op_mark(self):
        self.outer.append(self.stack)
        self.stack = []

    def op_none(self):
        self.stack.append(None)

    def op_newtrue(self):
        self.stack.append(True)

    def op_newfalse(self):
        self.stack.append(False)

    def op_binint(self):
        self.stack.append(self.number("<i"))

    def op_binint1(self):
        self.stack.append(self.number("B"))

    def op_binint2(self):
        self.stack.append(self.number("<H"))

    def op_long1(self):
        self.stack.append(int.from_bytes(self.take(self.number("B")), "little", signed=True))

    def op_binfloat(self):
        self.stack.append(self.number(">d"))

    def op_binunicode(self):
        self.stack.append(self.take(self.number("<I")).decode())

    def op_short_binunicode(self):
        self.stack.append(self.take(self.number("B")).decode())

    def op_binunicode8(self):
        self.stack.append(self.take(self.number("<Q")).decode())

    def op_binbytes(self):
        self.stack.append(self.take(self.number("<I")))

    def op_short_binbytes(self):
        self.stack.append(self.take(self.number("B")))

    def op_binbytes8(self):
        self.stack.append(self.take(self.number("<Q")))

    def op_bytearray8(self):
        self.stack.append(self.take(self.number("<Q")))

    def op_binstring(self):
        self._python2_string(self.number("<i"))

    def op_short_binstring(self):
        self._python2_string(self.number("B"))

    def _python2_string(self, length):
        """Text or bytes, which Python 2 did not tell apart."""
        if length < 0:
            raise UserError("its pickle is damaged (a text of negative length).")
        data = self.take(length)
        try:
            self.stack.append(data.decode())
        except UnicodeDecodeError:
            self.stack.append(data)

    def op_empty_list(self):
        self.stack.append([])

    def op_append(self):
        self._extend([self.stack.pop()])

    def op_appends(self):
        self._extend(self.items())

    def _extend(self, values):
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(values)

    def op_empty_tuple(self):
        self.stack.append(())

    def op_tuple(self):
        items = self.items()
        self.stack.append((*items,))

    def op_tuple1(self):
        self.stack[-1:] = [(self.stack[-1],)]

    def op_tuple2(self):
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def op_tuple3(self):
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def op_empty_dict(self):
        self.stack.append({})

    def op_setitem(self):
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def op_setitems(self):
        self._update(self.items())

    def _update(self, items):
        if not isinstance(self.stack[-1], dict):
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][check_key(key)] = value

    def op_empty_set(self):
        self.stack.append(set())

    def op_additems(self):
        items = self.items()
        if type(self.stack[-1]) is not set:
            raise TypeError
        self.stack[-1].update(map(check_key, items))

    def op_frozenset(self):
        items = self.items()
        self.stack.append(frozenset(map(check_key, items)))

    def op_binput(self):
        self.memo[self.number("B")] = self.stack[-1]

    def op_long_binput(self):
        self.memo[self.number("<I")] = self.stack[-1]

    def op_memoize(self):
        self.memo[len(self.memo)] = self.stack[-1]

    def op_binget(self):
        self.stack.append(self.memo[self.number("B")])

    def op_long_binget(self):
        self.stack.append(self.memo[self.number("<I")])

    def op_global(self):
        module, name = self.line(), self.line()
        self.stack.append(self.find(module, name))

    def op_stack_global(self):
        name = self.stack.pop()
        module = self.stack.pop()
        if type(module) is not str or type(name) is not str:
            raise TypeError
        self.stack.append(self.find(module, name))

    def op_reduce(self):
        arguments = self.stack.pop()
        call = self.stack.pop()
        if type(call) is not Call or type(arguments) is not tuple:
            raise TypeError
        self._charge(arguments)
        try:
            self.stack.append(call.function(*arguments))
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"its pickle is damaged ({call.name} with wrong arguments).") from error

    op_newobj = op_reduce  # cls.__new__(cls, *arguments): for the names of the table no different

    def op_build(self):
        state = self.stack.pop()
        self._charge((state,))
        self.stack[-1].build(state)

    def op_binpersid(self):
        self.stack.append(self.persistent(self.stack.pop()))

    def _charge(self, arguments):
        """Count what a call may copy: a short pickle could ask for the same long text a million times."""
        for argument in arguments:
            if isinstance(argument, (str, bytes)):
                self.copied -= len(argument)
            elif isinstance(argument, (tuple, list, dict, set, frozenset)):
                self.spend(len(argument))
        if self.copied < 0:
            raise UserError("its pickle asks for the same text again and again.")
