#!/bin/sh
# Process 1 of a lab guest: mounts what every Linux has, then runs the host's commands, which
# come as lines "id base64(command)" on the second serial port; the answer to each is a line
# "id exit-code base64(output)". Commands run beside each other; the lock keeps answers whole.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
cd /
mount -t sysfs sys /sys
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
ip link set lo up
hostname guest

stty -F /dev/ttyS1 115200 raw -echo
exec 3<>/dev/ttyS1
echo ready >&3
while read -r id command <&3; do
    (
        exec 3>&-
        base="/run/agent.$id"
        echo "$command" | base64 -d >"$base"
        sh "$base" >"$base.out" 2>&1 </dev/null
        code=$?
        {
            flock 9
            {
                printf '%s %s ' "$id" "$code"
                base64 -w0 "$base.out"
                echo
            } >/dev/ttyS1
        } 9>/run/agent.lock
        rm -f "$base" "$base.out"
    ) &
done
