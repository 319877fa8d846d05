/*
 * Guest memory: regions of shared files mapped at guest physical addresses.
 *
 * A table (struct vhost_memory) never changes once made.  A new table may share regions with the
 * old one; a region is unmapped when the last table that names it is gone.  So a queue may keep
 * using its table while the control thread prepares the next.
 *
 * A front-end can truncate the file behind a region, and the next touch raises SIGBUS.  The
 * handler replaces the whole region by private zero pages and marks it broken: the code that
 * faulted goes on with zeroes, nothing is unwound, and the queue notices at its next pass
 * (memory_faults moved) and breaks.  The handler finds the region in `live`, an array of slots
 * that it can read without locks.
 */
#include "internal.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define LIVE_MAX 65536 /* as many mappings as Linux gives a process (vm.max_map_count) */

static _Atomic(struct vhost_region *) live[LIVE_MAX];
static atomic_uint live_end; /* slots at and past this one were never used */
static struct sigaction sigbus_before;
static pthread_once_t sigbus_once = PTHREAD_ONCE_INIT;

atomic_uint memory_faults;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
    char *addr = info->si_addr;
    unsigned end = atomic_load_explicit(&live_end, memory_order_acquire);

    for (unsigned i = 0; i < end; i++) {
        struct vhost_region *r = atomic_load_explicit(&live[i], memory_order_acquire);
        if (!r || addr < (char *)r->map || addr >= (char *)r->map + r->map_len)
            continue;
        int saved = errno;
        void *p = mmap(r->map, r->map_len, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
        errno = saved;
        if (p == MAP_FAILED)
            break;
        atomic_store(&r->broken, true);
        atomic_fetch_add(&memory_faults, 1);
        return;
    }
    /* Not ours: hand it to whoever was there before us. */
    if (sigbus_before.sa_flags & SA_SIGINFO) {
        sigbus_before.sa_sigaction(sig, info, context);
    } else if (sigbus_before.sa_handler != SIG_DFL && sigbus_before.sa_handler != SIG_IGN) {
        sigbus_before.sa_handler(sig);
    } else {
        signal(sig, SIG_DFL);
    }
}

static void sigbus_install(void)
{
    struct sigaction sa = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};

    sigemptyset(&sa.sa_mask);
    sigaction(SIGBUS, &sa, &sigbus_before);
}

static int live_add(struct vhost_region *r)
{
    for (unsigned i = 0; i < LIVE_MAX; i++) {
        struct vhost_region *none = NULL;
        if (!atomic_load_explicit(&live[i], memory_order_relaxed) &&
            atomic_compare_exchange_strong(&live[i], &none, r)) {
            unsigned end = atomic_load(&live_end);
            while (end < i + 1 && !atomic_compare_exchange_weak(&live_end, &end, i + 1))
                ;
            return 0;
        }
    }
    return -ENOSPC;
}

static void live_remove(struct vhost_region *r)
{
    for (unsigned i = 0; i < LIVE_MAX; i++) {
        struct vhost_region *mine = r;
        if (atomic_load_explicit(&live[i], memory_order_relaxed) == r &&
            atomic_compare_exchange_strong(&live[i], &mine, NULL))
            return;
    }
}

/* The page size that the mapping's file demands: a hugetlbfs file takes whole huge pages only. */
static uint64_t file_page_size(int fd)
{
    const uint32_t hugetlbfs_magic = 0x958458f6;
    struct statfs fs;

    if (fstatfs(fd, &fs) == 0 && (uint32_t)fs.f_type == hugetlbfs_magic)
        return (uint64_t)fs.f_bsize;
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

static int region_map(int fd, uint64_t offset, uint64_t guest_addr, uint64_t size, int sharing,
                      struct vhost_region **out)
{
    struct stat st;
    uint64_t end;

    /* An end of exactly 2^64 would make every comparison below wrap, so it is refused too. */
    if (size == 0 || __builtin_add_overflow(guest_addr, size, &end) ||
        __builtin_add_overflow(offset, size, &end) || end > INT64_MAX)
        return -EINVAL;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode))
        return -ENODEV;
    if ((uint64_t)st.st_size < end)
        return -ENXIO;

    uint64_t page = file_page_size(fd);
    uint64_t start = offset & ~(page - 1);
    uint64_t len = (end - start + page - 1) & ~(page - 1);

    struct vhost_region *r = calloc(1, sizeof(*r));
    if (!r)
        return -ENOMEM;
    r->map = mmap(NULL, len, PROT_READ | PROT_WRITE, sharing | MAP_NORESERVE, fd, (off_t)start);
    if (r->map == MAP_FAILED) {
        int err = -errno;
        free(r);
        return err;
    }
    madvise(r->map, len, MADV_DONTDUMP);
    r->map_len = len;
    r->copy = sharing == MAP_PRIVATE;
    r->host = (char *)r->map + (offset - start);
    r->guest_addr = guest_addr;
    r->size = size;
    atomic_init(&r->refs, 1);
    pthread_once(&sigbus_once, sigbus_install);
    int err = live_add(r);
    if (err < 0) {
        munmap(r->map, len);
        free(r);
        return err;
    }
    *out = r;
    return 0;
}

int vhost_region_map(int fd, uint64_t offset, uint64_t guest_addr, uint64_t size,
                     struct vhost_region **out)
{
    return region_map(fd, offset, guest_addr, size, MAP_SHARED, out);
}

int vhost_region_map_copy(int fd, uint64_t offset, uint64_t guest_addr, uint64_t size,
                          struct vhost_region **out)
{
    return region_map(fd, offset, guest_addr, size, MAP_PRIVATE, out);
}

int region_join(const struct iovec *piece, uint32_t n, struct vhost_region **out)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), lead = (uintptr_t)piece[0].iov_base % page;
    uint64_t len = lead;

    for (uint32_t i = 0; i < n; i++) {
        len += piece[i].iov_len;
        if ((i && (uintptr_t)piece[i].iov_base % page) || (i < n - 1 && len % page))
            return -EINVAL;
    }
    len = (len + page - 1) & ~(page - 1);
    struct vhost_region *r = calloc(1, sizeof(*r));
    if (!r)
        return -ENOMEM;
    r->map = mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (r->map == MAP_FAILED) {
        free(r);
        return -ENOMEM;
    }
    r->map_len = len;
    r->host = (char *)r->map + lead;
    atomic_init(&r->refs, 1);
    int err = live_add(r);
    for (uint64_t at = 0; at < len && err == 0; piece++) {
        char *from = (char *)piece->iov_base - (at ? 0 : lead);
        uint64_t part = piece->iov_len + (at ? 0 : lead);
        part = (part + page - 1) & ~(page - 1);
        /* An old size of 0: the pages stay where they are, too. */
        if (mremap(from, 0, part, MREMAP_MAYMOVE | MREMAP_FIXED, (char *)r->map + at) == MAP_FAILED)
            err = -errno;
        at += part;
    }
    if (err < 0)
        vhost_region_unref(r);
    else
        *out = r;
    return err;
}

void vhost_region_unref(struct vhost_region *r)
{
    if (!r || atomic_fetch_sub(&r->refs, 1) != 1)
        return;
    live_remove(r);
    munmap(r->map, r->map_len);
    free(r);
}

static int by_guest_addr(const void *a, const void *b)
{
    const struct vhost_region *const *x = a, *const *y = b;

    return ((*x)->guest_addr > (*y)->guest_addr) - ((*x)->guest_addr < (*y)->guest_addr);
}

static int by_host_addr(const void *a, const void *b)
{
    const struct vhost_region *const *x = a, *const *y = b;

    return ((*x)->host > (*y)->host) - ((*x)->host < (*y)->host);
}

int vhost_memory_new(struct vhost_region **regions, uint32_t count, struct vhost_memory **out)
{
    struct vhost_memory *m = calloc(1, sizeof(*m) + 2 * count * sizeof(m->region[0]));

    if (!m)
        return -ENOMEM;
    atomic_init(&m->refs, 1);
    m->count = count;
    m->by_host = m->region + count;
    if (count) {
        memcpy(m->region, regions, count * sizeof(m->region[0]));
        memcpy(m->by_host, regions, count * sizeof(m->region[0]));
        qsort(m->region, count, sizeof(m->region[0]), by_guest_addr);
        qsort(m->by_host, count, sizeof(m->region[0]), by_host_addr);
    }
    for (uint32_t i = 1; i < count; i++) {
        if (m->region[i - 1]->guest_addr + m->region[i - 1]->size > m->region[i]->guest_addr) {
            free(m);
            return -EEXIST;
        }
    }
    for (uint32_t i = 0; i < count; i++)
        atomic_fetch_add(&m->region[i]->refs, 1);
    *out = m;
    return 0;
}

void memory_ref(struct vhost_memory *m)
{
    atomic_fetch_add(&m->refs, 1);
}

void vhost_memory_unref(struct vhost_memory *m)
{
    if (!m || atomic_fetch_sub(&m->refs, 1) != 1)
        return;
    for (uint32_t i = 0; i < m->count; i++)
        vhost_region_unref(m->region[i]);
    vhost_memory_unref(m->behind);
    free(m);
}

struct vhost_region *memory_search(const struct vhost_memory *m, uint64_t addr, uint32_t *hint)
{
    uint32_t low = 0, high = m->count;
    while (low < high) {
        uint32_t mid = (low + high) / 2;
        struct vhost_region *r = m->region[mid];
        if (addr < r->guest_addr) {
            high = mid;
        } else if (addr - r->guest_addr >= r->size) {
            low = mid + 1;
        } else {
            *hint = mid;
            return r;
        }
    }
    return NULL;
}

bool memory_is_broken(const struct vhost_memory *m)
{
    if (m->behind)
        m = m->behind;
    for (uint32_t i = 0; i < m->count; i++) {
        if (atomic_load(&m->region[i]->broken))
            return true;
    }
    return false;
}

static inline bool lies_in(const struct vhost_region *r, const void *host)
{
    return (uintptr_t)host - (uintptr_t)r->host < r->size;
}

uint64_t memory_guest_addr(const struct vhost_memory *m, const void *host, uint32_t *hint)
{
    if (m->behind)
        m = m->behind;
    uint32_t at = *hint, low = 0, high = m->count;

    while (at >= m->count || !lies_in(m->by_host[at], host)) {
        if (low == high)
            abort(); /* ring_pop took it from there */
        at = (low + high) / 2;
        if ((const char *)host < m->by_host[at]->host)
            high = at;
        else
            low = at + 1;
    }
    *hint = at;
    return m->by_host[at]->guest_addr + ((uintptr_t)host - (uintptr_t)m->by_host[at]->host);
}

void *vhost_memory_translate(const struct vhost_memory *m, uint64_t addr, uint64_t size)
{
    uint32_t hint = 0;
    struct vhost_region *r = memory_find(m, addr, &hint);

    if (!r || size > r->size - (addr - r->guest_addr))
        return NULL;
    return r->host + (addr - r->guest_addr);
}

int vhost_memory_discard(const struct vhost_memory *m, uint64_t addr, uint64_t size)
{
    uint32_t hint = 0;
    char *host = vhost_memory_translate(m, addr, size);
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

    if (!host)
        return -EFAULT;
    if ((uintptr_t)host % page || size % page)
        return -EINVAL;
    int advice = memory_find(m, addr, &hint)->copy ? MADV_DONTNEED : MADV_REMOVE;
    return size && madvise(host, size, advice) < 0 ? -errno : 0;
}
