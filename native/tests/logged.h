/* A dirty log of the guest's memory, and what is in it, as a set of pages. */
#ifndef LOGGED_H
#define LOGGED_H

#include "rig.h"

enum { PAGE = VHOST_LOG_PAGE, PAGES = 4 * GUEST_SIZE / PAGE };

#define UNLOGGED UINT64_MAX

/* The pages of the guest's memory, and those before it. */
static inline struct vhost_log *log_of_guest(void)
{
    struct vhost_log *log;

    CHECK_EQ(vhost_log_new(GUEST_BASE / PAGE + PAGES, &log), 0);
    return log;
}

static inline void set_log(struct control *c, struct vhost_queue *q, struct vhost_log *log,
                           uint64_t used)
{
    CHECK_EQ(vhost_queue_set_log(q, log, used, ++c->token), 0);
    CHECK_EQ(await_done(c).result, 0);
}

/* ---- what was logged, as the set of pages of guest memory ---- */

struct pages {
    bool dirty[PAGES];
};

static inline struct pages take_pages(struct vhost_log *log)
{
    struct pages p;
    uint8_t bits[PAGES / 8] = {0};

    CHECK_EQ(vhost_log_take(log, GUEST_BASE / PAGE, bits, PAGES), 0);
    for (int i = 0; i < PAGES; i++)
        p.dirty[i] = bits[i / 8] >> (i % 8) & 1;
    return p;
}

static inline void expect_pages(struct pages *p, uint64_t addr, uint64_t len)
{
    for (uint64_t i = (addr - GUEST_BASE) / PAGE; i <= (addr - GUEST_BASE + len - 1) / PAGE; i++) {
        if (!p->dirty[i])
            printf("# page %llu\n", (unsigned long long)i);
        CHECK(p->dirty[i]);
    }
}

static inline void forget_pages(struct pages *p, uint64_t addr, uint64_t len)
{
    for (uint64_t i = (addr - GUEST_BASE) / PAGE; i <= (addr - GUEST_BASE + len - 1) / PAGE; i++)
        p->dirty[i] = false;
}

static inline void expect_no_more(const struct pages *p)
{
    for (int i = 0; i < PAGES; i++)
        CHECK_EQ(p->dirty[i] ? i : -1, -1);
}

/* What the device writes to a ring that it logs where it is. */
static inline void forget_ring(struct pages *p, const struct driver_ring *d)
{
    if (d->packed)
        forget_pages(p, d->base + AT_DESC, 16u * d->size);
    forget_pages(p, d->base + AT_USED, d->packed ? 4u : 6u + 8u * d->size);
}

/* Where chains of it were used; forgotten then. */
static inline void expect_ring(struct pages *p, const struct driver_ring *d)
{
    if (d->packed)
        expect_pages(p, d->base + AT_DESC, 16u * d->size);
    else
        expect_pages(p, d->base + AT_USED, 6u + 8u * d->size);
    forget_ring(p, d);
}

#endif
