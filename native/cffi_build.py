"""Writes the C source of vdev._native from libvhost's contract headers.

usage: cffi_build.py HEADER... OUTPUT

Everything between a header's "cdef begin" and "cdef end" marks is what Python sees.
"""

import re
import sys
from pathlib import Path

from cffi import FFI


def main(*arguments: str) -> None:
    *headers, output = arguments
    builder = FFI()
    for header in headers:
        text = Path(header).read_text(encoding="utf-8")
        found = re.search(r"/\* cdef begin \*/(.*)/\* cdef end \*/", text, re.DOTALL)
        if found is None:
            sys.exit(f"{header}: no 'cdef begin' and 'cdef end' marks")
        builder.cdef(found.group(1))
    builder.set_source(
        "vdev._native", "\n".join(f"#include <{Path(header).name}>" for header in headers)
    )
    builder.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
