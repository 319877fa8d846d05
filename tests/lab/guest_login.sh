#!/bin/sh
# Process 1 of a guest that somebody logs in to: one login on the console; after it, off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
mount -t tmpfs run /run
mkdir -p /dev/pts
mountpoint -q /dev/pts || mount -t devpts devpts /dev/pts
hostname guest
# The last of several is what /dev/console is.
console=$(sed 's/.* //' /sys/class/tty/console/active)
setsid --wait agetty --local-line --noclear "$console" linux
mount -o remount,ro /
# reboot(2) of process 1 itself: what stood behind a page of another program is off by then.
exec perl -e 'syscall 169, 0xfee1dead, 0x28121969, 0x4321fedc, 0'
