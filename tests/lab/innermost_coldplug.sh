#!/bin/busybox sh
# shellcheck shell=dash
# Loads the modules that the present devices ask for; again until no new device appears, since
# loading a bus's driver finds the devices on it.
known=
while :; do
    found=$(find /sys/devices -name modalias -exec cat {} + | sort -u)
    [ "$found" != "$known" ] || break
    known=$found
    # shellcheck disable=SC2086 # One word an alias; those that no module is for are no error.
    modprobe -q -a $found 2>/dev/null
done
