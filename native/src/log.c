/*
 * The dirty log: which pages of guest memory the device has written.
 *
 * One bit a page of guest physical addresses, in the format of vhost-user's SET_LOG_BASE: the page
 * with number n is bit n % 8 of byte n / 8.  A reader takes bits out while iothreads set them, so
 * both sides work with atomic operations on bytes, and the order is what makes it a log:
 *
 *   device: data, then its bit (release), then the used index that tells the driver of the data
 *   reader: takes the bit (acquire), then reads the page
 *
 * A bit that was set before its data could be taken in between, and the page be read as it was.  A
 * used index before the bit would show the driver, and whoever stops it, data that is in no log.
 * The used ring itself is data in this sense: its bits follow the index.
 *
 * An atomic write for each page would wait for the data's stores each time.  So what was written is
 * noted (q->marks), bits of one byte together; right before the used index comes one full barrier
 * for the batch, and bits that are set by then, as most are, need no more than a look.  The used
 * ring's go by the barrier that publishing has anyway.  Nothing is noted any more when a queue
 * answers to control: whoever has stopped it, or given it another log, finds all in the one that
 * it was written under.
 *
 * A log may lie in a file of the front-end.  It is mapped as guest memory is, so that one that is
 * cut short is noticed as guest memory is; and no address is logged without being checked.
 */
#include "internal.h"
#include <errno.h>
#include <stdlib.h>

static int log_new(struct vhost_region *region, uint8_t *bits, uint64_t size,
                   struct vhost_log **out)
{
    struct vhost_log *log = bits ? calloc(1, sizeof(*log)) : NULL;

    if (!log)
        return -ENOMEM;
    atomic_init(&log->refs, 1);
    log->region = region;
    log->bits = bits;
    log->size = size;
    *out = log;
    return 0;
}

int vhost_log_map(int fd, uint64_t offset, uint64_t size, struct vhost_log **out)
{
    struct vhost_region *region;
    int err = vhost_region_map(fd, offset, 0, size, &region);

    if (err < 0)
        return err;
    err = log_new(region, (uint8_t *)region->host, size, out);
    if (err < 0)
        vhost_region_unref(region);
    return err;
}

int vhost_log_new(uint64_t pages, struct vhost_log **out)
{
    uint64_t size = pages / 8 + (pages % 8 != 0);
    uint8_t *bits = size ? calloc(1, size) : NULL;
    int err = size ? log_new(NULL, bits, size, out) : -EINVAL;

    if (err < 0)
        free(bits);
    return err;
}

void log_ref(struct vhost_log *log)
{
    if (log)
        atomic_fetch_add(&log->refs, 1);
}

void vhost_log_unref(struct vhost_log *log)
{
    if (!log || atomic_fetch_sub(&log->refs, 1) != 1)
        return;
    if (log->region) {
        vhost_region_unref(log->region);
    } else {
        free(log->bits);
    }
    free(log);
}

int vhost_log_take(struct vhost_log *log, uint64_t first_page, uint8_t *bits, uint64_t count)
{
    if (first_page % 8)
        return -EINVAL;
    uint64_t first = first_page / 8, left = log->size - first;
    if (first > log->size || count / 8 + (count % 8 != 0) > left)
        return -ERANGE;
    for (uint64_t i = 0; count; i++) {
        uint8_t *byte = &log->bits[first + i];
        uint8_t wanted = count < 8 ? (uint8_t)((1u << count) - 1) : 0xff;
        if (__atomic_load_n(byte, __ATOMIC_RELAXED) & wanted)
            bits[i] |= __atomic_fetch_and(byte, (uint8_t)~wanted, __ATOMIC_ACQUIRE) & wanted;
        count -= count < 8 ? count : 8;
    }
    return 0;
}

bool log_is_broken(const struct vhost_log *log)
{
    return log && log->region && atomic_load(&log->region->broken);
}

void log_set(struct vhost_queue *q)
{
    for (uint32_t i = 0; i < q->num_marks; i++) {
        const struct log_mark *mark = &q->marks[i];
        uint8_t *byte = &q->log->bits[mark->at];
        /* One that is taken after this look is taken after the write that it stands for, too. */
        if ((__atomic_load_n(byte, __ATOMIC_RELAXED) & mark->bits) != mark->bits)
            __atomic_fetch_or(byte, mark->bits, __ATOMIC_RELEASE);
    }
    q->num_marks = 0;
}

void log_flush(struct vhost_queue *q)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    log_set(q);
}

/* A request's pages are often those of its neighbour: its data's, and the one with its status. */
static inline void note(struct vhost_queue *q, uint64_t at, uint8_t bits)
{
    uint32_t n = q->num_marks;

    for (uint32_t back = 1; back <= 2 && back <= n; back++) {
        if (q->marks[n - back].at == at) {
            q->marks[n - back].bits |= bits;
            return;
        }
    }
    if (n == LOG_MARKS)
        log_flush(q);
    q->marks[q->num_marks++] = (struct log_mark){.at = at, .bits = bits};
}

void log_mark(struct vhost_queue *q, uint64_t guest_addr, uint64_t len)
{
    uint64_t first = guest_addr / VHOST_LOG_PAGE, last = (guest_addr + len - 1) / VHOST_LOG_PAGE;

    if (unlikely(first > last || last / 8 >= q->log->size)) {
        queue_break(q, VHOST_FAULT_LOG);
        return;
    }
    if (likely(first == last)) {
        note(q, first / 8, (uint8_t)(1u << first % 8));
        return;
    }
    for (uint64_t at = first / 8; at <= last / 8; at++) {
        unsigned from = at == first / 8 ? first % 8 : 0, to = at == last / 8 ? last % 8 : 7;
        note(q, at, (uint8_t)((0xff << from) & (0xff >> (7 - to))));
    }
}

void log_written(struct vhost_queue *q, const struct iovec *iov, uint32_t n, uint64_t len)
{
    for (; n && len; iov++, n--) {
        uint64_t part = iov->iov_len < len ? iov->iov_len : len;
        if (part)
            log_mark(q, memory_guest_addr(q->memory, iov->iov_base, &q->log_hint), part);
        len -= part;
    }
}
