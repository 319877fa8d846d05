"""libvhost as a library for others: its symbols, its header, its pkg-config file."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.native.build import HEADERS, SOURCES, build, run

CC = os.environ.get("CC", "cc")

PROGRAM = """
#include <libvhost.h>
#include <stdio.h>

int main(void)
{
    struct vhost_memory *memory;

    if (vhost_memory_new(NULL, 0, &memory) != 0)
        return 1;
    vhost_memory_unref(memory);
    printf("%llu\\n", (unsigned long long)vhost_histogram_floor(16));
    return 0;
}
"""


@pytest.fixture(scope="session")
def prefix() -> Path:
    """Where the library is installed."""
    where = build("plain")
    run("meson", "install", "-C", str(where))
    return where / "prefix"


def declared_functions() -> set[str]:
    text = "".join(header.read_text() for header in HEADERS)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return set(re.findall(r"\b((?:vhost|vmm|sandbox)_\w+)\s*\(", text))


def exported_symbols(library: Path) -> set[str]:
    lines = run("nm", "--dynamic", "--defined-only", "--format=posix", str(library)).splitlines()
    symbols = [line.split() for line in lines]
    return {fields[0].split("@")[0] for fields in symbols if fields[1] != "A"}


def mapped_patterns() -> list[str]:
    text = (SOURCES / "libvhost.map").read_text()
    found = re.search(r"global:(.*?)local:", text, flags=re.DOTALL)
    assert found, "libvhost.map has no global section"
    return re.findall(r"[\w*]+(?=;)", found.group(1))


def test_library_exports_what_the_header_declares(prefix: Path) -> None:
    assert exported_symbols(prefix / "lib" / "libvhost.so") == declared_functions()


def test_map_and_header_agree() -> None:
    patterns = mapped_patterns()
    functions = declared_functions()
    assert {f for f in functions if not any(fnmatch.fnmatch(f, p) for p in patterns)} == set()
    assert [p for p in patterns if not any(fnmatch.fnmatch(f, p) for f in functions)] == []


@pytest.mark.parametrize("standard", ["c11", "gnu11", "gnu17"])
@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header.name)
def test_header_stands_alone(tmp_path: Path, header: Path, standard: str) -> None:
    source = tmp_path / "alone.c"
    source.write_text(f"#include <{header.name}>\n#include <{header.name}>\nint x;\n")
    run(
        *(CC, f"-std={standard}", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"),
        *("-I", str(header.parent), str(source)),
    )


def test_program_links_by_pkg_config(prefix: Path, tmp_path: Path) -> None:
    env = {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "libvhost", env=env).split()
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text(PROGRAM)
    run(CC, "-Wall", "-Werror", str(source), "-o", str(program), *flags)
    output = subprocess.run(
        [program],
        env={**os.environ, "LD_LIBRARY_PATH": str(prefix / "lib")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert output == "16\n"
    version = run("pkg-config", "--modversion", "libvhost", env=env).strip()
    assert version == (prefix / "lib" / "libvhost.so").resolve().name.split(".so.")[1]
