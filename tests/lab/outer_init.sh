#!/bin/busybox sh
# shellcheck shell=dash disable=SC2154
# Process 1 of the KVM lab until its root is there: an overlay of this machine's memory on the
# host's root, which is only read, so that nothing done in here changes the host.
# /job/settings defines: results (a directory's place in here), keep (directories of the host that
# lie below a place on which a tmpfs is mounted), release (of the kernel), modules (its modules).
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do
    insmod "/modules/$module" || echo "initrd: $module was not loaded"
done </modules/order
# shellcheck source=/dev/null
. /job/settings

fail() {
    echo "initrd: $*"
    poweroff -f
}

mkdir /lower /upper /kept
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 root /lower ||
    fail "the host's root cannot be mounted"
mount -t tmpfs -o mode=755,size=75% upper /upper
mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /root ||
    fail "the overlay cannot be mounted"

number=0
for path in $keep; do
    number=$((number + 1))
    mkdir "/kept/$number"
    mount --bind "/root$path" "/kept/$number" || fail "$path cannot be kept"
done
mount --move /proc /root/proc
mount --move /sys /root/sys
mount --move /dev /root/dev
mount -t tmpfs -o mode=755 run /root/run
mount -t tmpfs -o mode=1777 tmp /root/tmp
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
number=0
for path in $keep; do
    number=$((number + 1))
    mkdir -p "/root$path"
    mount --move "/kept/$number" "/root$path"
done

mkdir -p "/root/lib/modules/$release" "/root$results"
mount --bind "/root$modules" "/root/lib/modules/$release" || fail "no modules in $modules"
mount -t 9p -o trans=virtio,version=9p2000.L,rw,cache=none,msize=512000 results "/root$results" ||
    fail "the directory for results cannot be mounted"
mkdir /root/run/lab
cp /job/* /root/run/lab/
exec switch_root /root /bin/sh /run/lab/main
