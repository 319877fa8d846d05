/*
 * In-flight tracking: what its parts for the two layouts have in common.  See inflight.c.
 */
#ifndef VHOST_INFLIGHT_H
#define VHOST_INFLIGHT_H

#include "internal.h"

struct vhost_inflight {
    atomic_uint refs;
    struct vhost_region *region;
    uint32_t num_queues, queue_size;
    bool packed;
};

/* A chain's, in packed rings. */
struct entries {
    uint16_t first, last;
};

/* What notes a queue's chains.  The part of the region that is the queue's (`shared`, and `chain`
 * or `desc`) is only written once the queue runs; the rest is nobody else's to change. */
struct tracker {
    struct vhost_inflight *region;
    uint64_t counter;   /* of the next chain */
    uint32_t num_again; /* chains to be popped once more */
    union {
        struct { /* split */
            struct vhost_user_inflight_split *shared;
            struct vhost_user_inflight_chain *chain; /* one a descriptor */
            uint16_t *again;       /* their heads, where the avail ring has heads */
            const uint16_t *heads; /* the avail ring's */
            uint16_t *batch;       /* heads that were pushed and not shown yet ... */
            uint32_t pushed;       /* ... so many */
            uint16_t last_batch_head;
        } split;
        struct { /* packed */
            struct vhost_user_inflight_packed *shared;
            struct vhost_user_inflight_desc *desc; /* entries, one a descriptor */
            struct vring_packed_desc *again;       /* descriptors, where the ring has them */
            struct entries *again_chain; /* of each chain to be popped once more, in order */
            uint32_t popped_again;       /* so many of them were */
            uint32_t again_descs;        /* of the others */
            struct entries *chain;       /* of the one in flight with this buffer id */
            uint16_t *next;              /* as in `desc` */
            uint16_t free_head;          /* of the list of free entries */
        } packed;
    };
};

/* A layout's half. */
struct tracking {
    size_t header, entry; /* bytes of a queue's part of the region, and of a descriptor in it */
    int (*alloc)(struct vhost_queue *q, void *shared);
    void (*free)(struct tracker *t);
    uint16_t (*version)(const struct tracker *t);
    void (*begin)(struct vhost_queue *q);
    int (*resume)(struct vhost_queue *q);
    void (*attach)(struct vhost_queue *q); /* puts its functions before the layout's */
};

extern const struct tracking track_split, track_packed;

/* A chain that an earlier server had popped. */
struct noted {
    uint64_t counter;
    uint16_t head; /* or its entry */
};

/* In the order in which they were popped; the next chain's counter comes after theirs. */
void inflight_sort(struct tracker *t, struct noted *noted);

/* What comes after it in the program is in the region after what comes before it, also if the
 * process is killed in between: that happens between two instructions. */
static inline void inflight_order(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

#endif
