/*
 * The split virtqueue (virtio 1.3, section 2.7).
 *
 * All that lies in guest memory may change at any time.  So each field is read once, with an
 * explicit load, into a local; the local is checked and used, and the field never looked at
 * again.  A fault of the guest breaks its ring (queue_break) and nothing else.
 */
#include "internal.h"
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>

/* Offsets in the avail and used rings, in units of 16 bits. */
enum { RING_FLAGS = 0, RING_IDX = 1, AVAIL_RING = 2 };

static inline uint16_t load16(const uint16_t *p, int order)
{
    return __atomic_load_n(p, order);
}

static inline uint16_t *used_event(const struct ring *r)
{
    return &r->avail[AVAIL_RING + r->size];
}

static inline uint16_t *avail_event(const struct ring *r)
{
    return (uint16_t *)&r->used_ring[r->size];
}

int ring_map(struct vhost_queue *q)
{
    struct ring *r = &q->ring;
    uint64_t n = r->size;

    /* Alignment: virtio 1.3, section 2.7, table "virtqueue part". */
    if (q->desc_addr % 16 || q->avail_addr % 2 || q->used_addr % 4)
        return -EINVAL;
    void *desc = vhost_memory_translate(q->memory, q->desc_addr, 16 * n);
    void *avail = vhost_memory_translate(q->memory, q->avail_addr, 6 + 2 * n);
    void *used = vhost_memory_translate(q->memory, q->used_addr, 6 + 8 * n);
    if (!desc || !avail || !used)
        return -EFAULT;
    /* A region may start at any offset of its file; the host address must be aligned as well. */
    if ((uintptr_t)desc % 8 || (uintptr_t)avail % 2 || (uintptr_t)used % 4)
        return -EINVAL;
    r->desc = desc;
    r->avail = avail;
    r->used = used;
    r->used_ring = (struct vring_used_elem *)(r->used + 2);
    return 0;
}

void ring_resume(struct vhost_queue *q)
{
    struct ring *r = &q->ring;

    r->used_idx = r->called_idx = load16(&r->used[RING_IDX], __ATOMIC_RELAXED);
    if (q->ops->in_order)
        r->next_avail = r->used_idx;
}

uint32_t ring_pending(struct vhost_queue *q)
{
    struct ring *r = &q->ring;
    /* Acquire: the entries and descriptors below idx were written before it. */
    uint16_t pending = load16(&r->avail[RING_IDX], __ATOMIC_ACQUIRE) - r->next_avail;

    if (unlikely(pending > r->size)) {
        queue_break(q, VHOST_FAULT_AVAIL_INDEX);
        return 0;
    }
    return pending;
}

/* One read of a descriptor, which the guest may be rewriting, and which may lie unaligned. */
static inline struct vring_desc desc_read(const struct vring_desc *d)
{
    struct raw {
        uint64_t addr, rest;
    } __attribute__((packed, may_alias));
    const volatile struct raw *raw = (const void *)d;
    uint64_t rest = raw->rest;

    return (struct vring_desc){
        .addr = raw->addr,
        .len = (uint32_t)rest,
        .flags = (uint16_t)(rest >> 32),
        .next = (uint16_t)(rest >> 48),
    };
}

/* Adds a buffer that does not lie in one region: over adjacent ones it becomes several iovecs.
 * Returns how many there are now, or a fault as a negative number.  Kept out of the walk, which
 * then has its counts in registers. */
static cold_path int add_split(struct vhost_queue *q, uint64_t addr, uint32_t len, uint32_t iovs)
{
    for (;;) {
        struct vhost_region *r = memory_find(q->memory, addr, &q->memory_hint);
        if (!r)
            return -VHOST_FAULT_ADDRESS;
        uint64_t offset = addr - r->guest_addr;
        uint64_t room = r->size - offset;
        if (iovs == q->iov_max)
            return -VHOST_FAULT_CHAIN_LENGTH;
        struct iovec *iov = &q->iov[iovs++];
        iov->iov_base = r->host + offset;
        if (len <= room) {
            iov->iov_len = len;
            return (int)iovs;
        }
        iov->iov_len = room;
        addr += room;
        len -= (uint32_t)room;
    }
}

/* Translates a buffer whole.  Returns as add_split does. */
static inline int add_buffer(struct vhost_queue *q, uint64_t addr, uint32_t len, uint32_t iovs)
{
    struct vhost_region *r = memory_find(q->memory, addr, &q->memory_hint);

    if (unlikely(!r || iovs == q->iov_max || len > r->size - (addr - r->guest_addr)))
        return add_split(q, addr, len, iovs);
    q->iov[iovs].iov_base = r->host + (addr - r->guest_addr);
    q->iov[iovs].iov_len = len;
    return (int)iovs + 1;
}

/* The host address of an indirect table; one that straddles regions is copied to q->table. */
static const struct vring_desc *indirect_table(struct vhost_queue *q, uint64_t addr, uint32_t len)
{
    const struct vhost_region *whole = memory_find(q->memory, addr, &q->memory_hint);

    if (likely(whole && len <= whole->size - (addr - whole->guest_addr)))
        return (const void *)(whole->host + (addr - whole->guest_addr));
    if (len > q->chain_max * sizeof(struct vring_desc))
        return NULL;
    for (uint32_t done = 0; done < len;) {
        struct vhost_region *r = memory_find(q->memory, addr + done, &q->memory_hint);
        if (!r)
            return NULL;
        uint64_t offset = addr + done - r->guest_addr;
        uint64_t part = r->size - offset < len - done ? r->size - offset : len - done;
        memcpy((char *)q->table + done, r->host + offset, part);
        done += (uint32_t)part;
    }
    return q->table;
}

/* Walks the chain from `head` into q->iov (virtio 1.3, sections 2.7.5.3 and 2.7.17). */
static enum vhost_fault walk(struct vhost_queue *q, uint16_t head, struct chain *c)
{
    const struct vring_desc *table = q->ring.desc;
    uint32_t table_len = q->ring.size, limit = q->ring.size;
    uint32_t i = head, seen = 0, iovs = 0, splits = 0, readable = 0;
    uint64_t readable_len = 0, writable_len = 0;
    bool writable = false, nested = false;

    for (;;) {
        struct vring_desc d = desc_read(&table[i]);

        if (d.flags & VRING_DESC_F_INDIRECT) {
            if (!q->ring.indirect || nested || (d.flags & VRING_DESC_F_NEXT) || d.len == 0 ||
                d.len % sizeof(struct vring_desc))
                return VHOST_FAULT_INDIRECT;
            table = indirect_table(q, d.addr, d.len);
            if (!table)
                return VHOST_FAULT_ADDRESS;
            table_len = d.len / sizeof(struct vring_desc);
            limit = q->chain_max;
            nested = true;
            i = 0;
            continue;
        }
        if (unlikely(++seen > limit))
            return VHOST_FAULT_CHAIN_LENGTH;
        if (unlikely(d.len == 0))
            return VHOST_FAULT_LENGTH;
        if (d.flags & VRING_DESC_F_WRITE) {
            if (!writable)
                readable = iovs;
            writable = true;
            writable_len += d.len;
        } else {
            if (unlikely(writable))
                return VHOST_FAULT_ORDER;
            readable_len += d.len;
        }
        int now = add_buffer(q, d.addr, d.len, iovs);
        if (unlikely(now < 0))
            return (enum vhost_fault) - now;
        splits += (uint32_t)now - iovs - 1;
        iovs = (uint32_t)now;
        if (!(d.flags & VRING_DESC_F_NEXT))
            break;
        if (unlikely(d.next >= table_len))
            return VHOST_FAULT_NEXT_RANGE;
        i = d.next;
    }
    /* used.len has 32 bits (section 2.7.5.2 forbids longer chains). */
    if (unlikely(readable_len + writable_len > UINT32_MAX))
        return VHOST_FAULT_LENGTH;
    c->iov = q->iov;
    c->readable = writable ? readable : iovs;
    c->writable = iovs - c->readable;
    c->readable_len = readable_len;
    c->writable_len = writable_len;
    c->splits = splits;
    c->head = head;
    return VHOST_FAULT_NONE;
}

bool ring_pop(struct vhost_queue *q, struct chain *chain)
{
    struct ring *r = &q->ring;
    uint16_t head =
        load16(&r->avail[AVAIL_RING + (r->next_avail & (r->size - 1))], __ATOMIC_RELAXED);
    enum vhost_fault fault;

    if (unlikely(head >= r->size)) {
        fault = VHOST_FAULT_HEAD_RANGE;
    } else if (unlikely(has_bit(q->busy[head / 64], head % 64))) {
        fault = VHOST_FAULT_HEAD_BUSY;
    } else {
        fault = walk(q, head, chain);
    }
    if (unlikely(fault)) {
        queue_break(q, fault);
        return false;
    }
    q->busy[head / 64] |= UINT64_C(1) << (head % 64);
    q->in_flight++;
    r->next_avail++;
    return true;
}

static inline void head_idle(struct vhost_queue *q, uint16_t head)
{
    q->busy[head / 64] &= ~(UINT64_C(1) << (head % 64));
    q->in_flight--;
}

void ring_unpop(struct vhost_queue *q, uint16_t head)
{
    head_idle(q, head);
    q->ring.next_avail--;
}

void ring_push(struct vhost_queue *q, uint16_t head, uint32_t len)
{
    struct ring *r = &q->ring;
    struct vring_used_elem *e = &r->used_ring[r->used_idx & (r->size - 1)];

    e->id = head;
    e->len = len;
    r->used_idx++;
    head_idle(q, head);
    if (!q->dirty)
        iothread_mark_dirty(q);
}

void ring_show(struct vhost_queue *q)
{
    /* Release: the elements and the buffers they tell of come before idx. */
    __atomic_store_n(&q->ring.used[RING_IDX], q->ring.used_idx, __ATOMIC_RELEASE);
}

/* An eventfd whose counter is full would block us: its owner does not look, so skip the call. */
static void call(struct vhost_queue *q)
{
    if (q->call_blocks) {
        struct pollfd p = {.fd = q->call_fd, .events = POLLOUT};
        if (poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT))
            return;
    }
    eventfd_write(q->call_fd, 1);
    count(q, VHOST_COUNTER_CALLS, 1);
}

void ring_publish(struct vhost_queue *q)
{
    struct ring *r = &q->ring;
    uint16_t old = r->called_idx, now = r->used_idx;
    bool wanted;

    ring_show(q);
    r->called_idx = now;
    if (q->call_fd < 0)
        return;
    /* The driver writes its wish, then reads idx; we write idx, then read its wish: both sides
     * need the full barrier, or both may miss the other (sections 2.7.7.1 and 2.7.10). */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (r->event_idx) {
        uint16_t event = load16(used_event(r), __ATOMIC_RELAXED);
        wanted = (uint16_t)(now - event - 1) < (uint16_t)(now - old);
    } else {
        wanted = !(load16(&r->avail[RING_FLAGS], __ATOMIC_RELAXED) & VRING_AVAIL_F_NO_INTERRUPT);
    }
    if (wanted) {
        call(q);
    } else {
        count(q, VHOST_COUNTER_CALLS_SUPPRESSED, 1);
    }
}

void ring_disarm(struct vhost_queue *q)
{
    /* With EVENT_IDX a stale avail_event silences the driver by itself. */
    if (!q->ring.event_idx)
        __atomic_store_n(&q->ring.used[RING_FLAGS], VRING_USED_F_NO_NOTIFY, __ATOMIC_RELAXED);
}

bool ring_arm(struct vhost_queue *q)
{
    struct ring *r = &q->ring;

    if (r->event_idx) {
        __atomic_store_n(avail_event(r), r->next_avail, __ATOMIC_RELAXED);
    } else {
        __atomic_store_n(&r->used[RING_FLAGS], 0, __ATOMIC_RELAXED);
    }
    /* As in ring_publish, the other way round: wish first, then look. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return load16(&r->avail[RING_IDX], __ATOMIC_RELAXED) != r->next_avail;
}
