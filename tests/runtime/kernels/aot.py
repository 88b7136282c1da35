"""Compile a Triton kernel for a GPU that is not there, and read what came out: matrix instructions, spills, memory.

Uses triton's own compiler and the ptxas, cuobjdump and nvdisasm that its wheel carries.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory a block may have (CUDA programming guide, compute capabilities)."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Binary:
    """One compiled kernel: PTX and SASS text, shared memory, stack and registers as the loader will see them."""

    ptx: str
    sass: str
    shared: int
    stack: int
    registers: int

    def instructions(self, pattern: str) -> int:
        """Number of SASS lines that match."""
        return len(re.findall(pattern, self.sass))

    def loop(self) -> list[str]:
        """SASS instructions of the largest loop, all of what a program does again and again.

        Blocks of instructions that reach each other, wherever the compiler put them: a wait may be repeated behind the last
        instruction of the kernel, and what is peeled off a loop can lie between that and the loop.
        """
        labels, blocks, jumps = {}, [[]], [[]]
        for line in self.sass.splitlines():
            label = re.match(r"\s*(\.L_x_\d+):", line)
            jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            blocks[-1] += [line] if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line) else []
            if label or jump or "EXIT" in line:  # a block ends
                jumps[-1] += [jump[1]] if jump else []
                jumps[-1] += [len(blocks)] if label or re.search(r"@|BRA\.(U|DIV)", line) else []
                labels |= {label[1]: len(blocks)} if label else {}
                blocks, jumps = [*blocks, []], [*jumps, []]
        after = [{labels.get(target, target) for target in some} for some in jumps]
        for via in range(len(after)):
            after = [reached | after[via] if via in reached else reached for reached in after]
        loops = ([i for i in sorted(reached) if here in after[i]] for here, reached in enumerate(after))
        return max(([line for i in loop for line in blocks[i]] for loop in loops), key=len)


def compile_for(capability, kernel, signature, constants, aligned=(), options=None) -> Binary:
    """Compile `kernel` (a JITFunction).

    Args:
        capability: 90, 100 or 120.
        signature: argument name -> type such as "*bf16", "i32", "tensordesc<fp8e5[128,128]>"; None for an absent pointer.
        constants: values of the tl.constexpr arguments.
        aligned: names of pointers and integers known to be divisible by 16, as the launcher would find.
    """
    names = list(kernel.arg_names)
    types = {name: signature.get(name) or "constexpr" for name in names}
    values = {name: constants.get(name) for name in names if types[name] == "constexpr"}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in values.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options or {})
    return inspect_binary(compiled)


def inspect_binary(compiled) -> Binary:
    """Disassemble one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Binary(compiled.asm["ptx"], sass, compiled.metadata.shared, int(stack), int(registers))


def _run(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
