/*
 * Views: what an IOMMU shows a device of guest memory.
 *
 * A view is a table of memory like any other to those who hold it: it never changes, and a queue
 * goes over from one to the next.  It has no regions of its own; queues in views walk their chains
 * by functions of their own (`pop_in_view`), which say for what access they look.  What they find
 * lies in the memory behind the view, whose regions it keeps, and whose guest addresses are logged.
 *
 * A ring may be in pieces, as its driver allocated it page by page.  A queue needs each of its
 * areas in one, so they are mapped once more, side by side.
 *
 * An address without a translation is nobody's fault.  The chain that has it stays where it is, the
 * queue tells of it once and waits (`blocked`), and looks again in the next view.
 */
#include "internal.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Of the largest area, in pages that it need not begin with. */
enum { PIECES_MAX = VIRTQUEUE_MAX_SIZE * 16 / 4096 + 1 };

struct translation {
    uint64_t iova, size;
    char *host;
    uint64_t access;
};

static int translate(struct translation *t, const struct vhost_memory *memory,
                     const struct vhost_translation *entry)
{
    uint64_t end;

    /* As of regions, an end of 2^64 is refused. */
    if (entry->size == 0 || __builtin_add_overflow(entry->iova, entry->size, &end) ||
        entry->access == 0 || entry->access & ~(uint64_t)(VHOST_ACCESS_READ | VHOST_ACCESS_WRITE))
        return -EINVAL;
    *t = (struct translation){
        .iova = entry->iova,
        .size = entry->size,
        .host = vhost_memory_translate(memory, entry->guest_addr, entry->size),
        .access = entry->access,
    };
    return t->host ? 0 : -EFAULT;
}

int vhost_memory_view(struct vhost_memory *memory, const struct vhost_translation *entries,
                      uint32_t count, struct vhost_memory **out)
{
    int err = memory->behind ? -EINVAL : 0;
    struct vhost_memory *view = calloc(1, sizeof(*view) + count * sizeof(struct translation));

    if (!view)
        return -ENOMEM;
    struct translation *t = (struct translation *)(view + 1);
    for (uint32_t i = 0; i < count && err == 0; i++) {
        err = translate(&t[i], memory, &entries[i]);
        if (err == 0 && i && t[i].iova < t[i - 1].iova + t[i - 1].size)
            err = -EINVAL;
    }
    if (err < 0) {
        free(view);
        return err;
    }
    atomic_init(&view->refs, 1);
    memory_ref(memory);
    view->behind = memory;
    view->translation = t;
    view->translations = count;
    *out = view;
    return 0;
}

static const struct translation *search(const struct vhost_memory *view, uint64_t iova,
                                        uint32_t *hint)
{
    const struct translation *t = view->translation;
    uint32_t low = 0, high = view->translations, at = *hint;

    while (at >= high || iova - t[at].iova >= t[at].size) {
        if (low == high)
            return NULL;
        at = (low + high) / 2;
        if (iova < t[at].iova)
            high = at;
        else if (iova - t[at].iova >= t[at].size)
            low = at + 1;
    }
    *hint = at;
    return &t[at];
}

char *view_find(const struct vhost_memory *view, uint64_t iova, unsigned access, uint32_t *hint,
                uint64_t *room)
{
    const struct translation *t = search(view, iova, hint);

    if (!t || (t->access & access) != access)
        return NULL;
    *room = t->size - (iova - t->iova);
    return t->host + (iova - t->iova);
}

/* ---- chains ---- */

/* As view_find; notes what is lacking. */
static char *find(struct vhost_queue *q, uint64_t iova, uint8_t access, uint64_t *room)
{
    char *host = view_find(q->memory, iova, access, &q->memory_hint, room);

    if (!host) {
        q->lacks = access;
        q->lacks_addr = iova;
    }
    return host;
}

int view_add(struct vhost_queue *q, uint64_t addr, uint32_t len, uint32_t iovs, bool write)
{
    uint8_t access = write ? VHOST_ACCESS_WRITE : VHOST_ACCESS_READ;
    uint64_t room;

    /* What wraps is nowhere; a front-end would be asked for it for ever. */
    if (addr > UINT64_MAX - len)
        return -VHOST_FAULT_ADDRESS;
    for (; len; addr += room, len -= (uint32_t)room) {
        char *host = find(q, addr, access, &room);
        if (!host)
            return -VHOST_FAULT_ADDRESS;
        if (iovs == q->iov_max)
            return -VHOST_FAULT_CHAIN_LENGTH;
        room = room < len ? room : len;
        q->iov[iovs++] = (struct iovec){.iov_base = host, .iov_len = room};
    }
    return (int)iovs;
}

const void *view_table(struct vhost_queue *q, uint64_t addr, uint32_t len)
{
    uint64_t room;

    if (addr > UINT64_MAX - len)
        return NULL;
    for (uint32_t done = 0; done < len; done += (uint32_t)room) {
        const char *host = find(q, addr + done, VHOST_ACCESS_READ, &room);
        if (!host || (done == 0 && len <= room))
            return host;
        if (len > q->chain_max * sizeof(struct vring_desc))
            return NULL;
        room = room < len - done ? room : len - done;
        memcpy((char *)q->table + done, host, room);
    }
    return q->table;
}

/* ---- rings ---- */

/* The pieces of memory that [iova, iova + size) is; returns how many, or 0: some of it is lacking,
 * or there are more pieces than `max`. */
static uint32_t find_pieces(const struct vhost_memory *view, uint64_t iova, uint64_t size,
                            unsigned access, struct iovec *piece, uint32_t max)
{
    uint32_t n = 0, hint = 0;
    uint64_t room;

    for (; size; iova += room, size -= room) {
        char *host = view_find(view, iova, access, &hint, &room);
        if (!host)
            return 0;
        room = room < size ? room : size;
        if (n && (char *)piece[n - 1].iov_base + piece[n - 1].iov_len == host) {
            piece[n - 1].iov_len += room;
            continue;
        }
        if (n == max)
            return 0;
        piece[n++] = (struct iovec){.iov_base = host, .iov_len = room};
    }
    return n;
}

void *ring_part(struct vhost_queue *q, enum ring_area area, uint64_t addr, uint64_t size,
                unsigned access)
{
    struct iovec piece[PIECES_MAX];

    vhost_region_unref(q->joined[area]);
    q->joined[area] = NULL;
    if (!q->memory->behind)
        return vhost_memory_translate(q->memory, addr, size);
    uint32_t n = find_pieces(q->memory, addr, size, access, piece, PIECES_MAX);
    if (n == 1)
        return piece[0].iov_base;
    if (n == 0 || region_join(piece, n, &q->joined[area]) < 0)
        return NULL;
    return q->joined[area]->host;
}

bool ring_is_broken(const struct vhost_queue *q)
{
    for (uint32_t i = 0; i < ARRAY_SIZE(q->joined); i++) {
        if (q->joined[i] && atomic_load(&q->joined[i]->broken))
            return true;
    }
    return false;
}

cold_path void view_log(struct vhost_queue *q, uint64_t iova, uint64_t len)
{
    uint32_t hint = 0;
    uint64_t room;

    for (; len; iova += room, len -= room) {
        const char *host = view_find(q->memory, iova, VHOST_ACCESS_WRITE, &hint, &room);
        if (!host)
            return; /* of a ring that broke since */
        room = room < len ? room : len;
        log_mark(q, memory_guest_addr(q->memory, host, &q->log_hint), room);
    }
}
