/* Windows for tests: a config over arrays of the window's size, and accesses of up to 8 bytes. */
#ifndef WINDOW_H
#define WINDOW_H

#include "harness.h"
#include <errno.h>
#include <libvmm.h>

enum { WINDOW_ROOM = 256 };

struct sketch {
    struct vmm_window_config config;
    uint8_t initial[WINDOW_ROOM];
    uint8_t writable[WINDOW_ROOM];
    uint8_t flags[WINDOW_ROOM];
};

static inline void sketch_init(struct sketch *s, uint64_t token, uint32_t size)
{
    *s = (struct sketch){.config = {.token = token, .size = size}};
    s->config.initial = s->initial;
    s->config.writable = s->writable;
    s->config.flags = s->flags;
}

static inline struct vmm_window *sketch_window(const struct sketch *s)
{
    struct vmm_window *window;

    CHECK_EQ(vmm_window_new(&s->config, &window), 0);
    return window;
}

/* `size` bytes, all of which the guest may write. */
static inline struct vmm_window *plain_window(uint64_t token, uint32_t size)
{
    struct sketch s;

    sketch_init(&s, token, size);
    memset(s.writable, 0xff, size);
    return sketch_window(&s);
}

static inline struct vmm_bus *new_bus(void)
{
    struct vmm_bus *bus;

    CHECK_EQ(vmm_bus_new(&bus), 0);
    return bus;
}

static inline uint64_t bus_read(struct vmm_bus *bus, int space, uint64_t address, uint32_t size)
{
    struct vmm_access told;
    uint64_t value = 0;

    CHECK_EQ(vmm_bus_access(bus, space, address, (uint8_t *)&value, size, false, &told), 0);
    return value;
}

static inline int bus_write(struct vmm_bus *bus, int space, uint64_t address, uint32_t size,
                            uint64_t value, struct vmm_access *told)
{
    return vmm_bus_access(bus, space, address, (uint8_t *)&value, size, true, told);
}

static inline void quiet_write(struct vmm_bus *bus, int space, uint64_t address, uint32_t size,
                               uint64_t value)
{
    struct vmm_access told;

    CHECK_EQ(bus_write(bus, space, address, size, value, &told), 0);
}

#endif
