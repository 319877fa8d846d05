/*
 * In-flight tracking of packed rings.
 *
 * What is used is written over what was available, so a chain's descriptors are noted whole.  They
 * take entries off a list of free ones, one a descriptor, and so the region says twice what is in
 * flight: by the flag of a chain's first entry, and by what the list lacks.  The list counts. Every
 * store of these matters (see inflight.c):
 *
 *   pop      the entries, which are on the list yet
 *            free_head and old_free_head, as one       the list without them
 *   show     next of each chain's last entry: the batch goes before the list
 *            free_head; used_idx with its counter
 *            the flags of the first used descriptor    (packed_show)
 *            inflight = 0 for each of the batch
 *            old_free_head; old_used_idx with its counter
 *
 * While the two used indexes differ, the descriptor at the old one tells whether the driver has
 * been shown the batch; if not, what is old counts.  Then the descriptors behind it may be marked
 * as used already, from where the driver would go on once it is shown another one: they are
 * unmarked.
 *
 * The end of the list is an entry that there is not: the number of all.
 */
#include "inflight.h"
#include "packed.h"
#include <errno.h>
#include <stdlib.h>

/* A queue's used indexes, in one store: between two, no place of the ring would be said. */
union used_places {
    struct {
        uint16_t idx, old_idx;
        uint8_t wrap_counter, old_wrap_counter;
    };
    uint64_t word;
};

_Static_assert(offsetof(struct vhost_user_inflight_packed, used_idx) % sizeof(word) == 0 &&
                   offsetof(struct vhost_user_inflight_packed, padding) -
                           offsetof(struct vhost_user_inflight_packed, used_idx) ==
                       offsetof(union used_places, old_wrap_counter) + 1,
               "the region has them as a word");

static word *used_of(const struct tracker *t)
{
    return (void *)&t->packed.shared->used_idx;
}

static void store_used(struct tracker *t, union used_places used)
{
    __atomic_store_n(used_of(t), used.word, __ATOMIC_RELAXED);
}

/* No update is under way. */
static union used_places both_used(uint16_t idx, uint8_t wrap_counter)
{
    return (union used_places){{idx, idx, wrap_counter, wrap_counter}};
}

_Static_assert(offsetof(struct vhost_user_inflight_packed, free_head) % sizeof(uint32_t) == 0 &&
                   offsetof(struct vhost_user_inflight_packed, old_free_head) ==
                       offsetof(struct vhost_user_inflight_packed, free_head) + sizeof(uint16_t),
               "and the list's heads as one half as long");

typedef uint32_t __attribute__((may_alias)) both_heads;

/* No update is under way. */
static void store_heads(struct tracker *t, uint16_t head)
{
    __atomic_store_n((both_heads *)&t->packed.shared->free_head, head | (uint32_t)head << 16,
                     __ATOMIC_RELAXED);
}

static uint16_t load(const uint16_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static void store(uint16_t *p, uint16_t value)
{
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
}

/* ---- what an earlier server left ---- */

/* What is read of the region, once, and made of it. */
struct found {
    uint16_t free_head;
    uint16_t used_idx;
    bool used_wrap_counter;
    uint32_t num_descs; /* in flight */
    struct vhost_user_inflight_desc *desc;
    bool *taken; /* an entry that is on the list, or in a chain */
    struct noted *noted;
};

/* An update of which the driver has seen the end has happened, any other has not. */
static int read_head(const struct vhost_queue *q, struct found *f)
{
    const struct tracker *t = q->tracker;
    const struct vhost_user_inflight_packed *shared = t->packed.shared;
    union used_places used = {.word = __atomic_load_n(used_of(t), __ATOMIC_RELAXED)};
    uint16_t free_head = load(&shared->free_head), old_free_head = load(&shared->old_free_head);

    if (load(&shared->desc_num) != t->region->queue_size || used.idx >= q->ring.size ||
        used.old_idx >= q->ring.size || used.wrap_counter > 1 || used.old_wrap_counter > 1)
        return -EBADMSG;
    bool begun = used.idx != used.old_idx || used.wrap_counter != used.old_wrap_counter;
    uint16_t available = used.old_wrap_counter ? AVAIL : USED;
    if (begun && !is_available(&q->ring.slot[used.old_idx], available)) {
        used.old_idx = used.idx;
        used.old_wrap_counter = used.wrap_counter;
        old_free_head = free_head;
    }
    f->free_head = old_free_head;
    f->used_idx = used.old_idx;
    f->used_wrap_counter = used.old_wrap_counter;
    return 0;
}

static void read_entries(const struct tracker *t, struct vhost_user_inflight_desc *to)
{
    const volatile struct vhost_user_inflight_desc *from = t->packed.desc;

    for (uint32_t i = 0; i < t->region->queue_size; i++)
        to[i] = from[i];
}

/* Takes the entry, if there is one and nothing else has it. */
static bool take(struct found *f, uint32_t size, uint16_t entry)
{
    if (entry >= size || f->taken[entry])
        return false;
    f->taken[entry] = true;
    return true;
}

static int take_chain(struct found *f, uint32_t size, uint16_t first)
{
    uint16_t entry = first, num = f->desc[first].num;

    if (num == 0 || !take(f, size, first))
        return -EBADMSG;
    for (uint16_t i = 1; i < num; i++) {
        entry = f->desc[entry].next;
        if (!take(f, size, entry))
            return -EBADMSG;
    }
    f->num_descs += num;
    return entry == f->desc[first].last ? 0 : -EBADMSG;
}

/* Tells the free entries and the chains apart; there is nothing else. */
static int read_region(struct vhost_queue *q, struct found *f)
{
    struct tracker *t = q->tracker;
    uint32_t size = t->region->queue_size, num_free = 0, num_chains = 0;
    int err = read_head(q, f);

    if (err < 0)
        return err;
    read_entries(t, f->desc);
    for (uint16_t e = f->free_head; e != size; e = f->desc[e].next, num_free++) {
        if (!take(f, size, e) || f->desc[e].inflight > 1)
            return -EBADMSG;
        f->desc[e].inflight = 0;
    }
    for (uint32_t i = 0; i < size; i++) {
        if (f->desc[i].inflight > 1)
            return -EBADMSG;
        if (!f->desc[i].inflight)
            continue;
        if (take_chain(f, size, (uint16_t)i) < 0)
            return -EBADMSG;
        f->noted[num_chains++] = (struct noted){.counter = f->desc[i].counter, .head = (uint16_t)i};
    }
    if (num_free + f->num_descs != size || f->num_descs > q->ring.size)
        return -EBADMSG;
    t->num_again = num_chains;
    t->packed.again_descs = f->num_descs;
    return 0;
}

/* Has the region say in full what it says now. */
static void settle(struct tracker *t, const struct found *f)
{
    struct vhost_user_inflight_packed *shared = t->packed.shared;

    for (uint32_t i = 0; i < t->region->queue_size; i++) {
        if (!f->desc[i].inflight)
            __atomic_store_n(&t->packed.desc[i].inflight, 0, __ATOMIC_RELAXED);
        t->packed.next[i] = f->desc[i].next;
    }
    inflight_order();
    store(&shared->free_head, f->free_head);
    store(&shared->old_free_head, f->free_head);
    inflight_order();
    store_used(t, both_used(f->used_idx, f->used_wrap_counter));
    t->packed.free_head = f->free_head;
}

/* What is in flight stands before what is available. */
static void place_again(struct vhost_queue *q, const struct found *f)
{
    struct tracker *t = q->tracker;
    struct ring *r = &q->ring;
    uint16_t at = f->used_idx, bits = f->used_wrap_counter ? AVAIL : USED;

    r->used_idx = r->next_avail = at;
    r->used_bits = f->used_wrap_counter ? AVAIL | USED : 0;
    r->avail_bits = bits;
    for (uint32_t i = 0; i < t->num_again; i++) {
        uint16_t first = f->noted[i].head, e = first;
        t->packed.again_chain[i] = (struct entries){first, f->desc[first].last};
        for (uint16_t left = f->desc[first].num; left; left--, e = f->desc[e].next) {
            const struct vhost_user_inflight_desc *d = &f->desc[e];
            uint16_t flags = d->flags & (VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT);
            t->packed.again[at] = (struct vring_packed_desc){
                .addr = d->addr,
                .len = d->len,
                .id = d->id,
                .flags = bits | flags | (left > 1 ? VRING_DESC_F_NEXT : 0),
            };
            /* What was marked as used and not shown. */
            uint16_t *seen = &r->slot[at].flags;
            if (!is_available(&r->slot[at], bits)) {
                __atomic_store_n(seen, t->packed.again[at].flags, __ATOMIC_RELAXED);
                if (q->log)
                    ring_log(q, q->desc_addr, at * sizeof(*r->slot), sizeof(*r->slot));
            }
            move(r, &at, &bits, 1);
        }
    }
    if (t->num_again)
        r->offered = t->packed.again;
}

static int resume(struct vhost_queue *q)
{
    struct tracker *t = q->tracker;
    uint32_t size = t->region->queue_size;
    struct found f = {
        .desc = calloc(size, sizeof(*f.desc)),
        .taken = calloc(size, sizeof(*f.taken)),
        .noted = calloc(size, sizeof(*f.noted)),
    };
    int err = f.desc && f.taken && f.noted ? read_region(q, &f) : -ENOMEM;

    if (err == 0) {
        inflight_sort(t, f.noted);
        place_again(q, &f);
        settle(t, &f);
    }
    free(f.desc);
    free(f.taken);
    free(f.noted);
    return err;
}

/* ---- life ---- */

static int alloc(struct vhost_queue *q, void *shared)
{
    struct tracker *t = q->tracker;
    uint32_t size = t->region->queue_size, ring_size = q->ring.size;

    t->packed.shared = shared;
    t->packed.desc = (void *)(t->packed.shared + 1);
    t->packed.again = calloc(ring_size, sizeof(*t->packed.again));
    t->packed.again_chain = calloc(size, sizeof(*t->packed.again_chain));
    t->packed.chain = calloc(ring_size, sizeof(*t->packed.chain));
    t->packed.next = calloc(size, sizeof(*t->packed.next));
    return t->packed.again && t->packed.again_chain && t->packed.chain && t->packed.next ? 0
                                                                                         : -ENOMEM;
}

static void free_tracker(struct tracker *t)
{
    free(t->packed.again);
    free(t->packed.again_chain);
    free(t->packed.chain);
    free(t->packed.next);
}

static uint16_t version(const struct tracker *t)
{
    return load(&t->packed.shared->version);
}

/* Nothing was noted there yet; the version tells that all else is in place. */
static void begin(struct vhost_queue *q)
{
    struct tracker *t = q->tracker;
    struct vhost_user_inflight_packed *shared = t->packed.shared;
    uint32_t size = t->region->queue_size;
    uint8_t counter = q->ring.used_bits != 0;

    for (uint32_t i = 0; i < size; i++) {
        t->packed.next[i] = (uint16_t)(i + 1);
        t->packed.desc[i] = (struct vhost_user_inflight_desc){.next = (uint16_t)(i + 1)};
    }
    store(&shared->desc_num, (uint16_t)size);
    store(&shared->free_head, 0);
    store(&shared->old_free_head, 0);
    store_used(t, both_used(q->ring.used_idx, counter));
    inflight_order();
    store(&shared->version, VHOST_USER_INFLIGHT_VERSION);
}

/* ---- while the queue runs ---- */

static int tracked_map(struct vhost_queue *q)
{
    int err = ring_packed.map(q);

    if (q->tracker->num_again)
        q->ring.offered = q->tracker->packed.again;
    return err;
}

/* As far as the region says, the chain of these `n` descriptors is in flight; it has the list's
 * first entries.  What is next to each other is stored at once: such stores wait for those to the
 * ring, for which the line must come from the driver, and few can wait. */
static inline void take_off(struct tracker *t, struct entries chain, uint16_t rest, uint32_t n)
{
    struct vhost_user_inflight_desc *desc = &t->packed.desc[chain.first];
    uint64_t next = t->packed.next[chain.first];

    __atomic_store_n((word *)desc, 1 | next << 16 | (uint64_t)chain.last << 32 | (uint64_t)n << 48,
                     __ATOMIC_RELAXED);
    desc->counter = t->counter++;
    inflight_order();
    store_heads(t, rest);
    t->packed.free_head = rest;
}

static cold_path bool take_again(struct vhost_queue *q, struct chain *chain, enum walk walk)
{
    struct tracker *t = q->tracker;

    if (!packed_take(q, chain, walk, NULL))
        return false;
    t->packed.again_descs -= q->lengths[chain->head];
    t->packed.chain[chain->head] = t->packed.again_chain[t->packed.popped_again++];
    if (--t->num_again == 0)
        q->ring.offered = q->ring.slot;
    return true;
}

compiled_apart bool tracked_take(struct vhost_queue *q, struct chain *chain, enum walk walk)
{
    struct tracker *t = q->tracker;

    if (unlikely(t->num_again))
        return take_again(q, chain, walk);
    struct notes notes = {
        .desc = t->packed.desc,
        .next = t->packed.next,
        .entry = t->packed.free_head,
    };
    if (!packed_take(q, chain, walk, &notes))
        return false;
    struct entries entries = {t->packed.free_head, notes.last};
    take_off(t, entries, notes.entry, q->lengths[chain->head]);
    t->packed.chain[chain->head] = entries;
    return true;
}

static bool tracked_pop(struct vhost_queue *q, struct chain *chain)
{
    return tracked_take(q, chain, WALK_MEMORY);
}

static bool tracked_pop_in_view(struct vhost_queue *q, struct chain *chain)
{
    return tracked_take(q, chain, WALK_VIEW);
}

/* Puts what was pushed before the list; returns its first entry, and adds up the descriptors.
 * Chains that come back as they went are linked already. */
static inline uint16_t link_batch(struct tracker *t, const struct used *used, uint32_t n,
                                  uint32_t *taken)
{
    uint16_t head = t->packed.free_head;

    while (n--) {
        struct entries chain = t->packed.chain[used[n].id];
        if (t->packed.next[chain.last] != head) {
            t->packed.next[chain.last] = head;
            store(&t->packed.desc[chain.last].next, head);
        }
        head = chain.first;
        *taken += used[n].taken;
    }
    return head;
}

static void tracked_show(struct vhost_queue *q)
{
    struct tracker *t = q->tracker;
    struct vhost_user_inflight_packed *shared = t->packed.shared;
    const struct used *used = q->ring.unshown;
    uint32_t n = q->ring.num_unshown, taken = 0;
    uint16_t old_idx = q->ring.used_idx, old_bits = q->ring.used_bits;
    uint16_t idx = old_idx, bits = old_bits;

    if (!n)
        return;
    uint16_t head = link_batch(t, used, n, &taken);
    move(&q->ring, &idx, &bits, taken);
    inflight_order();
    store(&shared->free_head, head);
    inflight_order();
    store_used(t, (union used_places){{idx, old_idx, bits != 0, old_bits != 0}});
    inflight_order();
    ring_packed.show(q);
    inflight_order();
    for (uint32_t i = 0; i < n; i++) {
        uint16_t first = t->packed.chain[used[i].id].first;
        __atomic_store_n(&t->packed.desc[first].inflight, 0, __ATOMIC_RELAXED);
    }
    inflight_order();
    store(&shared->old_free_head, head);
    inflight_order();
    store_used(t, both_used(idx, bits != 0));
    t->packed.free_head = head;
}

static void tracked_publish(struct vhost_queue *q)
{
    tracked_show(q);
    ring_packed.publish(q);
}

static uint32_t tracked_next_index(const struct vhost_queue *q)
{
    /* One that was never enabled leaves to the next server what the last one had popped. */
    struct ring r = q->ring;

    move(&r, &r.next_avail, &r.avail_bits, q->tracker->packed.again_descs);
    return avail_place(&r) | (uint32_t)used_place(&r) << 16;
}

static void attach(struct vhost_queue *q)
{
    struct ring_layout *layout = &q->ring.layout;

    layout->map = tracked_map;
    layout->pop = q->memory->behind ? tracked_pop_in_view : tracked_pop;
    layout->show = tracked_show;
    layout->publish = tracked_publish;
    layout->next_index = tracked_next_index;
}

const struct tracking track_packed = {
    .header = sizeof(struct vhost_user_inflight_packed),
    .entry = sizeof(struct vhost_user_inflight_desc),
    .alloc = alloc,
    .free = free_tracker,
    .version = version,
    .begin = begin,
    .resume = resume,
    .attach = attach,
};
