/*
 * The sandbox of a process that serves an adversary: what it gives up once it has opened all it
 * needs.  vdev reads the part between the "cdef" marks through cffi.
 *
 * Order: everything here but `sandbox_enter` is called once, by the only thread, from the top of
 * this file to its end; Linux keeps credentials, Landlock domains, namespaces and filters for each
 * thread, and threads that start later inherit them.  Then each thread enters its class.
 *
 * Functions return 0 or a negative errno, unless they say otherwise.
 *
 * Sources: Linux, Documentation/userspace-api/{seccomp_filter,landlock,no_new_privs}.rst;
 * capabilities(7), pivot_root(2), seccomp(2).
 */
#ifndef LIBSANDBOX_H
#define LIBSANDBOX_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef begin */

/* ---- what the process can reach ---- */

struct sandbox_path {
    const char *path; /* absolute, exists, without symbolic links */
    bool writable;
};

/* Moves this thread into namespaces of its own: CLONE_NEW* flags. */
int sandbox_unshare(int flags);

/* Makes an empty read-only tmpfs the root, in which only `paths` are mounted, at their places and
 * read-only unless writable; a path comes before those below it.  Needs a mount namespace of its
 * own.  -ENOSYS before Linux 5.12. */
int sandbox_new_root(const struct sandbox_path *paths, uint32_t num_paths);

/* Version of Landlock's interface, or -ENOSYS, -EOPNOTSUPP where the kernel has none. */
int sandbox_landlock_abi(void);

/* Leaves only `paths` to be opened, TCP only if `tcp`, and (ABI 6) neither abstract sockets nor
 * signals of others.  What is open stays so.  Returns the ABI that is in force. */
int sandbox_landlock(const struct sandbox_path *paths, uint32_t num_paths, bool tcp);

/* ---- what the process may ask for ---- */

/* Becomes user `uid` and group `gid` (-1: stays who it is) without other groups, gives up every
 * capability for good, cannot gain any by exec, and can be neither dumped nor traced. */
int sandbox_drop(int64_t uid, int64_t gid);

/* The classes of threads.  Threads start as what their creator is, and only ever narrow down:
 * whatever a class may do, CONTROL may. */
enum sandbox_class {
    SANDBOX_CONTROL = 0,
    SANDBOX_IOTHREAD = 1,
    SANDBOX_VCPU = 2,
    SANDBOX_CLASSES = 3,
};

enum sandbox_flag {
    /* io_uring_setup fails with EPERM: iothreads that start later use their worker pools. */
    SANDBOX_NO_NEW_IO_URING = 1,
};

enum sandbox_limit {
    SANDBOX_FAMILIES_MAX = 8,
    /* How a process ends that made a forbidden system call: 128 + SIGSYS. */
    SANDBOX_EXIT_CODE = 159,
};

struct sandbox_config {
    uint32_t flags;
    uint32_t num_families;
    int32_t family[SANDBOX_FAMILIES_MAX]; /* of sockets that may be made: AF_UNIX... */
};

/* Makes the filters and arms `sandbox_enter`.  -EALREADY the second time. */
int sandbox_seal(const struct sandbox_config *config);
bool sandbox_is_sealed(void);

/* Puts the calling thread under the filter of its class; does nothing before `sandbox_seal`.
 * From then on a forbidden system call writes one line to stderr and ends the process. */
int sandbox_enter(enum sandbox_class thread_class);

/* cdef end */

#ifdef __cplusplus
}
#endif

#endif
