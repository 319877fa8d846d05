/*
 * A file for a machine's RAM, on a tmpfs of its own that is mounted nowhere.
 *
 * A memfd lies on the kernel's own tmpfs, which has huge pages only where the administrator said so
 * (shmem_enabled, "never" unless told): each 4 KiB that a guest touches first then costs an exit,
 * and one more level in each walk of its page tables ever after.  A mount says for itself
 * (Documentation/admin-guide/mm/transhuge.rst, "huge=").
 */
#include "libvmm.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux/mount.h; it and glibc's sys/mount.h cannot be had together everywhere. */
enum {
    TMPFS_OPEN_CLOEXEC = 1,
    TMPFS_SET_STRING = 1,
    TMPFS_CREATE = 6,
    TMPFS_MOUNT_CLOEXEC = 1,
};

/* For those who look at /proc/PID/maps. */
#define NAME "guest-ram"

static int set_option(int fs, const char *key, const char *value)
{
    return syscall(SYS_fsconfig, fs, TMPFS_SET_STRING, key, value, 0) < 0 ? -errno : 0;
}

static int mount_tmpfs(int fs)
{
    int err = set_option(fs, "huge", "within_size");

    /* Not half of the host's memory, but whatever is asked of it. */
    if (err == 0)
        err = set_option(fs, "size", "0");
    if (err == 0 && syscall(SYS_fsconfig, fs, TMPFS_CREATE, NULL, NULL, 0) < 0)
        err = -errno;
    if (err < 0)
        return err;
    int mount = (int)syscall(SYS_fsmount, fs, TMPFS_MOUNT_CLOEXEC, 0);
    return mount < 0 ? -errno : mount;
}

int vmm_ram_file(void)
{
    int fs = (int)syscall(SYS_fsopen, "tmpfs", TMPFS_OPEN_CLOEXEC);

    if (fs < 0)
        return -errno;
    int mount = mount_tmpfs(fs);
    close(fs);
    if (mount < 0)
        return mount;
    int fd = openat(mount, NAME, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    int err = -errno;
    if (fd >= 0)
        unlinkat(mount, NAME, 0);
    close(mount);
    return fd < 0 ? err : fd;
}
