/* What the process gives up besides system calls: files, namespaces, its user, capabilities. */
#include "libsandbox.h"
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux/landlock.h and linux/mount.h, of kernels newer than the headers that we build with. */
struct landlock_rules {
    uint64_t fs, net, scope;
};
struct landlock_beneath {
    uint64_t allowed;
    int32_t parent_fd;
} __attribute__((packed));
struct mount_attributes {
    uint64_t set, clear, propagation, userns_fd;
};

enum {
    LANDLOCK_VERSION = 1,
    LANDLOCK_PATH_BENEATH = 1,
    LANDLOCK_FS_EXECUTE = 1 << 0,
    LANDLOCK_FS_WRITE_FILE = 1 << 1,
    LANDLOCK_FS_READ_FILE = 1 << 2,
    LANDLOCK_FS_READ_DIR = 1 << 3,
    LANDLOCK_FS_MAKE_CHAR = 1 << 6,
    LANDLOCK_FS_MAKE_BLOCK = 1 << 11,
    LANDLOCK_FS_ABI_1 = (1 << 13) - 1,
    LANDLOCK_FS_REFER = 1 << 13,     /* ABI 2 */
    LANDLOCK_FS_TRUNCATE = 1 << 14,  /* ABI 3 */
    LANDLOCK_FS_IOCTL_DEV = 1 << 15, /* ABI 5 */
    LANDLOCK_NET_TCP = 3,            /* ABI 4: bind, connect */
    LANDLOCK_SCOPES = 3,             /* ABI 6: abstract sockets, signals */
    CLONE_TREE = 1,
    TREE_RECURSIVE = 0x8000,
    TREE_EMPTY_PATH = 0x1000,
    MOVE_EMPTY_PATH = 4,
    MOUNT_READ_ONLY = 1,
    MOUNT_NO_SUID = 2,
    MOUNT_NO_EXEC = 8,
};

#define STAGE "/tmp" /* where the new root is put together */

/* ---- namespaces and the root ---- */

int sandbox_unshare(int flags)
{
    return unshare(flags) < 0 ? -errno : 0;
}

static int make_place(char *target, bool directory)
{
    struct stat st;

    if (stat(target, &st) == 0)
        return 0;
    for (char *slash = target + sizeof(STAGE); (slash = strchr(slash, '/')); slash++) {
        *slash = '\0';
        int made = mkdir(target, 0755);
        *slash = '/';
        if (made < 0 && errno != EEXIST)
            return -errno;
    }
    if (directory)
        return mkdir(target, 0755) < 0 ? -errno : 0;
    int fd = open(target, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return -errno;
    close(fd);
    return 0;
}

static int place(int tree, const struct sandbox_path *p)
{
    struct mount_attributes attributes = {.set = MOUNT_NO_SUID | MOUNT_NO_EXEC |
                                                 (p->writable ? 0 : MOUNT_READ_ONLY)};
    char target[PATH_MAX];
    struct stat st;

    if (snprintf(target, sizeof(target), STAGE "%s", p->path) >= (int)sizeof(target))
        return -ENAMETOOLONG;
    if (fstat(tree, &st) < 0)
        return -errno;
    int err = make_place(target, S_ISDIR(st.st_mode));
    if (err < 0)
        return err;
    if (syscall(SYS_mount_setattr, tree, "", TREE_EMPTY_PATH | TREE_RECURSIVE, &attributes,
                sizeof(attributes)) < 0 ||
        syscall(SYS_move_mount, tree, "", AT_FDCWD, target, MOVE_EMPTY_PATH) < 0)
        return -errno;
    return 0;
}

static int change_root(void)
{
    if (chdir(STAGE) < 0)
        return -errno;
    if (syscall(SYS_pivot_root, ".", ".") == 0) {
        if (umount2(".", MNT_DETACH) < 0)
            return -errno;
    } else if (errno != EINVAL || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0) {
        return -errno; /* an initramfs cannot be pivoted away: it is mounted over */
    }
    if (chdir("/") < 0)
        return -errno;
    unsigned long flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
    return mount(NULL, "/", NULL, flags, NULL) < 0 ? -errno : 0;
}

enum { PATHS_MAX = 64 };

int sandbox_new_root(const struct sandbox_path *paths, uint32_t num_paths)
{
    int tree[PATHS_MAX];
    uint32_t opened = 0;
    int err = 0;

    if (num_paths > PATHS_MAX)
        return -E2BIG;
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        return -errno;
    /* Taken before the stage hides what lies beneath it. */
    for (; opened < num_paths && err == 0; opened++) {
        tree[opened] = (int)syscall(SYS_open_tree, AT_FDCWD, paths[opened].path,
                                    CLONE_TREE | O_CLOEXEC | TREE_RECURSIVE);
        if (tree[opened] < 0) {
            err = -errno;
            break;
        }
    }
    if (err == 0 && mount("vdev", STAGE, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755") < 0)
        err = -errno;
    if (err == 0) {
        for (uint32_t i = 0; i < num_paths && err == 0; i++)
            err = place(tree[i], &paths[i]);
        if (err == 0)
            err = change_root();
        if (err < 0)
            umount2(STAGE, MNT_DETACH);
    }
    while (opened)
        close(tree[--opened]);
    return err;
}

/* ---- Landlock ---- */

int sandbox_landlock_abi(void)
{
    long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_VERSION);

    return abi < 0 ? -errno : (int)abi;
}

static uint64_t handled_fs(int abi)
{
    uint64_t fs = LANDLOCK_FS_ABI_1;

    fs |= abi >= 2 ? LANDLOCK_FS_REFER : 0;
    fs |= abi >= 3 ? LANDLOCK_FS_TRUNCATE : 0;
    fs |= abi >= 5 ? LANDLOCK_FS_IOCTL_DEV : 0;
    return fs;
}

static int add_path(int ruleset, uint64_t handled, const struct sandbox_path *p)
{
    uint64_t never = LANDLOCK_FS_EXECUTE | LANDLOCK_FS_MAKE_CHAR | LANDLOCK_FS_MAKE_BLOCK;
    uint64_t of_files = LANDLOCK_FS_WRITE_FILE | LANDLOCK_FS_READ_FILE | LANDLOCK_FS_TRUNCATE |
                        LANDLOCK_FS_IOCTL_DEV;
    struct landlock_beneath rule = {
        .allowed = handled & (p->writable ? ~never : LANDLOCK_FS_READ_FILE | LANDLOCK_FS_READ_DIR),
        .parent_fd = open(p->path, O_PATH | O_CLOEXEC),
    };
    struct stat st;
    int err = 0;

    if (rule.parent_fd < 0)
        return -errno;
    if (fstat(rule.parent_fd, &st) == 0 && !S_ISDIR(st.st_mode))
        rule.allowed &= of_files;
    if (syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_PATH_BENEATH, &rule, 0) < 0)
        err = -errno;
    close(rule.parent_fd);
    return err;
}

int sandbox_landlock(const struct sandbox_path *paths, uint32_t num_paths, bool tcp)
{
    int abi = sandbox_landlock_abi();
    struct landlock_rules rules = {0};

    if (abi < 0)
        return abi;
    rules.fs = handled_fs(abi);
    rules.net = abi >= 4 && !tcp ? LANDLOCK_NET_TCP : 0;
    rules.scope = abi >= 6 ? LANDLOCK_SCOPES : 0;
    /* The kernel refuses sizes with non-zero bytes that it does not know, and takes smaller. */
    int ruleset = (int)syscall(SYS_landlock_create_ruleset, &rules, sizeof(rules), 0);
    if (ruleset < 0)
        return -errno;
    int err = 0;
    for (uint32_t i = 0; i < num_paths && err == 0; i++)
        err = add_path(ruleset, rules.fs, &paths[i]);
    if (err == 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        err = -errno;
    if (err == 0 && syscall(SYS_landlock_restrict_self, ruleset, 0) < 0)
        err = -errno;
    close(ruleset);
    return err < 0 ? err : abi;
}

/* ---- user and capabilities ---- */

static int change_user(uid_t uid, gid_t gid)
{
    if (setgroups(0, NULL) < 0 || setresgid(gid, gid, gid) < 0 || setresuid(uid, uid, uid) < 0)
        return -errno;
    return setuid(0) == 0 ? -ENOTRECOVERABLE : 0;
}

int sandbox_drop(int64_t uid, int64_t gid)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0}, {0}};
    int err = 0;

    /* Without CAP_SETPCAP this is refused; no_new_privs makes the set meaningless all the same. */
    for (unsigned long cap = 0; prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) == 0; cap++)
        ;
    if (uid >= 0)
        err = change_user((uid_t)uid, (gid_t)gid);
    if (err == 0 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
        err = -errno;
    if (err == 0 && syscall(SYS_capset, &header, none) < 0)
        err = -errno;
    if (err == 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        err = -errno;
    /* After the change of user, which sets it anew. */
    if (err == 0 && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
        err = -errno;
    return err;
}
