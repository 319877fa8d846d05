/*
 * What an IOMMU shows the device of the fuzzer's guest, and a front-end that changes it between
 * turns: it tells more, takes back, or makes up translations of the bytes in guest memory.
 *
 * Pages of IOVAs are those of guest memory in another order, so that the ring is in pieces; as many
 * again are lacking.  What is told later may be a part of a page.
 */
#ifndef FUZZ_IOTLB_H
#define FUZZ_IOTLB_H

#include "../tests/harness.h"
#include "internal.h"
#include <string.h>

enum { IOVA_PAGE = 4096, IOVA_PAGES = 8, MADE_UP_MAX = 3 };

/* A change, out of a turn's two words: `at` has the kind in its upper 3 bits, modulo 4, and the
 * IOVA's page in its lower 3.  `value`: the guest page (2 bits), by how much less than a page it is
 * (2 bits, each halves it), the access (2 bits; 0: taken back), where in the page it begins (1
 * bit). */
enum iotlb_change_kind { IOTLB_NONE, IOTLB_MORE, IOTLB_DRAINED, IOTLB_MADE_UP };

struct iotlb {
    struct vhost_translation page[IOVA_PAGES];  /* access 0: nothing is there */
    struct vhost_translation holds[IOVA_PAGES]; /* of the present view, sorted */
    uint32_t count;
};

static inline void iotlb_open(struct iotlb *t, unsigned order, uint64_t guest_pages)
{
    for (uint64_t i = 0; i < IOVA_PAGES; i++) {
        t->page[i] = (struct vhost_translation){
            .iova = i * IOVA_PAGE,
            .size = IOVA_PAGE,
            .guest_addr = (i ^ order) % guest_pages * IOVA_PAGE,
            .access = i < guest_pages ? VHOST_ACCESS_READ | VHOST_ACCESS_WRITE : 0,
        };
    }
}

/* What stands in the pages, as a view; the caller's. */
static inline struct vhost_memory *iotlb_view(struct iotlb *t, struct vhost_memory *behind)
{
    struct vhost_memory *view;

    t->count = 0;
    for (uint32_t i = 0; i < IOVA_PAGES; i++) {
        if (t->page[i].access)
            t->holds[t->count++] = t->page[i];
    }
    CHECK_EQ(vhost_memory_view(behind, t->holds, t->count, &view), 0);
    return view;
}

static inline void iotlb_change(struct iotlb *t, uint16_t at, uint16_t value, uint64_t guest_pages)
{
    struct vhost_translation *page = &t->page[at % IOVA_PAGES];
    uint64_t size = IOVA_PAGE >> (value >> 2 & 3), begin = value >> 6 & 1 ? IOVA_PAGE - size : 0;

    page->iova = at % IOVA_PAGES * (uint64_t)IOVA_PAGE + begin;
    page->guest_addr = (value & 3) % guest_pages * IOVA_PAGE + begin;
    page->size = size;
    page->access = value >> 4 & 3;
}

/* A view of what the bytes say, or NULL where they are refused. */
static inline struct vhost_memory *iotlb_made_up(struct iotlb *t, struct vhost_memory *behind,
                                                 const void *bytes)
{
    struct vhost_translation made_up[MADE_UP_MAX];
    struct vhost_memory *view;

    memcpy(made_up, bytes, sizeof(made_up));
    if (vhost_memory_view(behind, made_up, MADE_UP_MAX, &view) < 0)
        return NULL;
    memcpy(t->holds, made_up, sizeof(made_up));
    t->count = MADE_UP_MAX;
    return view;
}

/* Whether the device may do that there, by some translation. */
static inline bool iotlb_allows(const struct iotlb *t, uint64_t guest_addr, uint64_t len,
                                uint64_t access)
{
    for (uint32_t i = 0; i < t->count; i++) {
        const struct vhost_translation *e = &t->holds[i];
        if ((e->access & access) == access && guest_addr >= e->guest_addr && len <= e->size &&
            guest_addr - e->guest_addr <= e->size - len)
            return true;
    }
    return false;
}

#endif
