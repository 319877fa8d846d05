#!/bin/busybox sh
# shellcheck shell=dash
# Process 1 of the innermost guest. Words of the kernel's command line that it knows:
#   lab.modules=A,B   load these modules (default: those that the devices found ask for)
#   lab.run=BASE64    run this shell script once ready; its exit code is printed as GUEST EXIT n
#   lab.end=WORD      what to do after that: poweroff, reboot, or (default) a root shell
#   root=DISK         instead of all that: this disk, an ext4, is the root, read-only without rw;
#   init=PROGRAM      and process 1 is this one of it
# Files appended to the initrd below /init.d are run, in the order of their names, before READY.
export PATH=/bin HOME=/ PS1='guest# ' TERM=linux
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp

options=ro
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
        lab.modules=*) modules=${word#*=} ;;
        lab.run=*) run=${word#*=} ;;
        lab.end=*) end=${word#*=} ;;
        root=*) root=${word#*=} ;;
        init=*) init=${word#*=} ;;
        rw) options=rw ;;
    esac
done
if [ "$modules" ]; then
    old=$IFS
    IFS=,
    for module in $modules; do
        modprobe "$module" || echo "guest: $module was not loaded"
    done
    IFS=$old
else
    coldplug
fi
if [ "$root" ]; then
    mount -t ext4 -o "$options" "$root" /mnt
    umount /dev/pts
    for place in dev proc sys; do mount --move "/$place" "/mnt/$place"; done
    exec switch_root -c /dev/console /mnt "${init:-/sbin/init}"
fi
ip link set lo up
for script in /init.d/*; do
    [ ! -x "$script" ] || "$script"
done

# The kernel opens the console before a virtio-console is there.
exec </dev/console >/dev/console 2>&1
echo "GUEST READY"
if [ "$run" ]; then
    echo "$run" | base64 -d >/run/script
    sh /run/script
    echo "GUEST EXIT $?"
fi
case $end in
    poweroff | reboot) "$end" -f ;;
esac
# A shell that ends is followed by another; process 1 itself must not.
while :; do
    setsid -c sh -i </dev/console >/dev/console 2>&1
done
