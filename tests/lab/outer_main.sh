#!/bin/sh
# shellcheck disable=SC2154
# Process 1 of the KVM lab on the host's root. Runs /run/lab/job and tells its exit code on the
# port lab.control. What it writes leaves by the ports lab.out and lab.err, events by lab.events;
# each ends with a mark, since bytes may still be under way when the exit code has arrived.
# /run/lab/settings also defines: shell (not empty: the job has the terminal hvc0), mark.
# shellcheck source=/dev/null
. /run/lab/settings
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
hostname kvm-lab
ip link set lo up
chmod 666 /dev/kvm
# Opening these loads their modules; elsewhere udev makes them.
mkdir -p /dev/net
mknod /dev/net/tun c 10 200
mknod /dev/fuse c 10 229
mknod /dev/loop-control c 10 237
chmod 666 /dev/net/tun /dev/fuse

mkdir -p /dev/virtio-ports
for port in /sys/class/virtio-ports/*; do
    if read -r name <"$port/name"; then
        ln -s "../${port##*/}" "/dev/virtio-ports/$name"
    fi 2>/dev/null
done
exec 3<>/dev/virtio-ports/lab.control
# Emulated SVM now and then loses the word that interrupts are pending; the next one for the same
# CPU brings it back. So each CPU has one that the host raises: a key, and a line on this port.
echo 1 >/proc/irq/1/smp_affinity
for place in /proc/irq/*/virtio*-virtqueues; do
    echo 2 >"${place%/*}/smp_affinity"
done
cat <&3 >/dev/null &
beats=$!
echo ready >&3
# Where that does not help: each CPU says that it is alive.
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
    number=${cpu##*cpu}
    # shellcheck disable=SC2016 # the inner shell expands it
    taskset -c "$number" sh -c 'while sleep 5; do echo "alive $0" >&3; done' "$number" &
    beats="$beats $!"
done

if [ "$shell" ]; then
    setsid -c sh /run/lab/job <>/dev/hvc0 >&0 2>&1
    code=$?
    echo "exit $code" >&3
else
    mkfifo /run/lab/out /run/lab/err
    cat /run/lab/out >/dev/virtio-ports/lab.out &
    out=$!
    cat /run/lab/err >/dev/virtio-ports/lab.err &
    err=$!
    setsid sh /run/lab/job </dev/null >/run/lab/out 2>/run/lab/err
    code=$?
    # What the job left running would hold its output open. Kernel threads have no executable.
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        case $pid in
            1 | "$out" | "$err") continue ;;
        esac
        case " $beats " in *" $pid "*) continue ;; esac
        [ -e "$process/exe" ] && kill -9 "$pid"
    done 2>/dev/null
    wait "$out" "$err"
    for name in out err events; do
        printf '\000%s' "$mark" >"/dev/virtio-ports/lab.$name"
    done
    echo "exit $code" >&3
fi
sync
# The host ends the machine.
while :; do sleep 3600; done
