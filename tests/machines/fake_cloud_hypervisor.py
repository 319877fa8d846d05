"""A program that behaves like cloud-hypervisor towards whoever drives it, without a guest.

It speaks the API, connects to the vhost-user sockets of its configuration as a disk's driver does
and writes a line per sector that it has read, copies its console's input back in capitals, and
does what a guest would at the words that are typed: ``poweroff``, ``panic``, ``reboot``, ``fault``.
FAKE_CH (environment): ``die``, ``hang``, ``garbage``, ``deaf`` (does not end when it is asked to).
Every request is a line of JSON in the file FAKE_CH_LOG.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import tty
from typing import Any

from tests.frontend.blk import SECTOR, BlkClient
from tests.frontend.session import Session

HOW = os.environ.get("FAKE_CH", "")


class Program:
    """Its state, and what the API does with it."""

    def __init__(self, api_fd: int, events_fd: int) -> None:
        self.listener = socket.socket(fileno=api_fd)
        self.events_fd = events_fd
        os.set_blocking(events_fd, False)
        self.config: dict[str, Any] = {}
        self.connected: dict[str, BlkClient | Session] = {}
        self.state = "none"

    def event(self, source: str, event: str, /, **properties: str) -> None:
        text = json.dumps(
            {"timestamp": {"secs": 1}, "source": source, "event": event, "properties": properties},
            indent=2,
        )
        os.write(self.events_fd, text.encode() + b"\n\n")

    def say(self, text: str) -> None:
        os.write(1, f"{text}\n".encode())

    def leave(self, code: int) -> None:
        os._exit(code)

    def connect(self, table: dict[str, Any]) -> None:
        device = table["id"]
        if "mac" in table:
            self.connected[device] = Session(table["vhost_socket"])
            self.say(f"{device} connected")
            return
        disk = BlkClient(table["vhost_socket"], queues=table["num_queues"])
        self.connected[device] = disk
        self.say(f"{device} has {disk.read(0, SECTOR).rstrip(bytes(1)).decode()}")

    def boot(self) -> None:
        self.state = "running"
        for where in ("disks", "net"):
            for table in self.config.get(where, ()):
                self.connect(table)
        tty.setraw(0)
        self.say("booted")

    def reboot(self) -> None:
        self.event("vm", "rebooting")
        for device in self.connected.values():
            device.close()
        self.boot()
        self.event("vm", "rebooted")

    def answer(self, command: str, body: Any) -> tuple[int, Any]:
        match command:
            case "vmm.ping":
                return 200, {"version": "53.0", "pid": os.getpid()}
            case "vm.create":
                if body["cpus"]["boot_vcpus"] == 3:
                    return 400, ["The VM could not be created", "three\nis a crowd"]
                self.config = body
            case "vm.boot":
                self.boot()
            case "vm.pause":
                if self.state != "running":
                    return 405, ["not running"]
                self.state = "paused"
            case "vm.resume":
                if self.state != "paused":
                    return 405, ["not paused"]
                self.state = "running"
            case "vm.reboot":
                self.reboot()
            case "vm.power-button":
                self.say("power button")
            case "vm.resize":
                self.say(f"balloon {body['desired_balloon']}")
            case "vm.add-disk" | "vm.add-net":
                if body["id"] == "refused":
                    return 500, ["The disk could not be added to the VM."]
                self.connect(body)
                return 200, {"id": body["id"], "bdf": "0000:00:06.0"}
            case "vm.remove-device":
                self.connected.pop(body["id"]).close()
                self.event("vm", "device-removed", id=body["id"], bdf="0000:00:06.0")
            case "vmm.shutdown":
                if HOW == "deaf":
                    threading.Event().wait()
            case _:
                return 404, None
        return 204, None

    def serve(self) -> None:
        sock, _ = self.listener.accept()
        with sock, sock.makefile("rwb") as stream:
            while request := stream.readline():
                command = request.split()[1].decode().removeprefix("/api/v1/")
                size = 0
                while (line := stream.readline()) != b"\r\n":
                    name, _, value = line.partition(b":")
                    if name == b"Content-Length":
                        size = int(value)
                body = json.loads(stream.read(size)) if size else None
                with open(os.environ["FAKE_CH_LOG"], "a") as log:
                    log.write(json.dumps([command, body]) + "\n")
                if HOW == "garbage":
                    stream.write(b"SSH-2.0-not http\r\n\r\n")
                    stream.flush()
                    continue
                status, answer = self.answer(command, body)
                data = b"" if answer is None else json.dumps(answer).encode()
                stream.write(f"HTTP/1.1 {status} \r\nConnection: keep-alive\r\n".encode())
                if data:
                    stream.write(b"Content-Length: %d\r\n" % len(data))
                stream.write(b"\r\n" + data)
                stream.flush()
                if command == "vmm.shutdown":
                    self.leave(0)

    def guest(self) -> None:
        while data := os.read(0, 4096):
            match data.strip():
                case b"poweroff":
                    self.say("goodbye")
                    self.event("vm", "deleted")
                    self.leave(0)
                case b"panic":
                    self.event("guest", "panic", event="crash_loaded")
                    self.event("guest", "panic", event="panic")
                case b"reboot":
                    self.reboot()
                case b"fault":
                    os.write(2, b"cloud-hypervisor: 1.5s: <vcpu0> ERROR:vmm/src/cpu.rs:9 -- ")
                    os.write(2, b"VCPU generated error: VcpuRun\n")
                    self.leave(0)
                case words:
                    self.say(words.upper().decode())


def main(arguments: list[str]) -> None:
    if HOW == "die":
        sys.stderr.write("Error: Cloud Hypervisor exited with the following chain of errors:\n")
        sys.stderr.write("  0: Failed to open hypervisor interface\n  1: no /dev/kvm\n")
        raise SystemExit(1)
    if HOW == "hang":
        threading.Event().wait()
    fds = dict(zip(arguments[::2], arguments[1::2], strict=True))
    program = Program(*(int(fds[name][3:]) for name in ("--api-socket", "--event-monitor")))
    threading.Thread(target=program.guest, daemon=True).start()
    program.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
