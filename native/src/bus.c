/*
 * Two sorted lists of windows under one lock that vCPU threads share: notifications of virtqueues
 * never come here (ioeventfds), so accesses are rare and short.
 */
#include "bus.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct space {
    struct vmm_window **window; /* by base */
    uint32_t count;
};

struct vmm_bus {
    pthread_rwlock_t lock;
    struct space space[2];
};

int vmm_bus_new(struct vmm_bus **out)
{
    struct vmm_bus *bus = calloc(1, sizeof(*bus));
    pthread_rwlockattr_t attr;

    if (!bus)
        return -ENOMEM;
    /* Or vCPUs that access without end would keep the control thread from placing anything. */
    pthread_rwlockattr_init(&attr);
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&bus->lock, &attr);
    pthread_rwlockattr_destroy(&attr);
    *out = bus;
    return 0;
}

void vmm_bus_free(struct vmm_bus *bus)
{
    if (!bus)
        return;
    for (int i = 0; i < 2; i++) {
        for (uint32_t n = 0; n < bus->space[i].count; n++)
            bus->space[i].window[n]->bus = NULL;
        free(bus->space[i].window);
    }
    pthread_rwlock_destroy(&bus->lock);
    free(bus);
}

/* The index of the first window that ends behind `address`. */
static uint32_t first_behind(const struct space *space, uint64_t address)
{
    uint32_t low = 0, high = space->count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct vmm_window *w = space->window[middle];
        if (w->base + (w->size - 1) < address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int insert(struct space *space, struct vmm_window *window, uint64_t base)
{
    uint32_t at = first_behind(space, base);

    if (at < space->count && space->window[at]->base <= base + (window->size - 1))
        return -EEXIST;
    struct vmm_window **grown = realloc(space->window, (space->count + 1) * sizeof(*space->window));
    if (!grown)
        return -ENOMEM;
    space->window = grown;
    memmove(grown + at + 1, grown + at, (space->count - at) * sizeof(*grown));
    grown[at] = window;
    space->count++;
    return 0;
}

int vmm_bus_place(struct vmm_bus *bus, struct vmm_window *window, int space, uint64_t base)
{
    uint64_t last_address = space == VMM_SPACE_PIO ? UINT16_MAX : UINT64_MAX;
    uint64_t end;

    if (window->bus)
        return -EBUSY;
    if ((space != VMM_SPACE_PIO && space != VMM_SPACE_MMIO) ||
        __builtin_add_overflow(base, window->size - 1, &end) || end > last_address)
        return -EINVAL;
    pthread_rwlock_wrlock(&bus->lock);
    int err = insert(&bus->space[space], window, base);
    if (err == 0) {
        window->bus = bus;
        window->space = space;
        window->base = base;
    }
    pthread_rwlock_unlock(&bus->lock);
    return err;
}

void vmm_bus_remove(struct vmm_bus *bus, struct vmm_window *window)
{
    if (window->bus != bus)
        return;
    pthread_rwlock_wrlock(&bus->lock);
    struct space *space = &bus->space[window->space];
    uint32_t at = first_behind(space, window->base);
    space->count--;
    memmove(space->window + at, space->window + at + 1,
            (space->count - at) * sizeof(*space->window));
    window->bus = NULL;
    pthread_rwlock_unlock(&bus->lock);
}

enum bus_outcome bus_access(struct vmm_bus *bus, int space, uint64_t address, uint8_t *data,
                            uint32_t size, bool write, struct vmm_access *told)
{
    enum bus_outcome outcome = BUS_LOST;

    pthread_rwlock_rdlock(&bus->lock);
    const struct space *s = &bus->space[space];
    uint32_t at = first_behind(s, address);
    if (at < s->count && s->window[at]->base <= address) {
        struct vmm_window *w = s->window[at];
        uint64_t offset = address - w->base;
        if (size <= w->size - offset)
            outcome = w->access(w, (uint32_t)offset, data, size, write, told) ? BUS_TOLD : BUS_DONE;
    }
    pthread_rwlock_unlock(&bus->lock);
    if (outcome == BUS_LOST && !write)
        memset(data, 0xff, size);
    return outcome;
}

int vmm_bus_access(struct vmm_bus *bus, int space, uint64_t address, uint8_t *data, uint32_t size,
                   bool write, struct vmm_access *told)
{
    if (size == 0 || size > ACCESS_MAX || (space != VMM_SPACE_MMIO && space != VMM_SPACE_PIO))
        return -EINVAL;
    return bus_access(bus, space, address, data, size, write, told) == BUS_TOLD;
}
