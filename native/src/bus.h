/* What the guest's two address spaces hold: windows, each answered by its own `access`. */
#ifndef VMM_BUS_H
#define VMM_BUS_H

#include "internal.h"
#include <libvmm.h>
#include <pthread.h>

enum { ACCESS_MAX = 8 }; /* bytes */

struct vmm_window {
    /* Returns true where the control thread has to answer; `told` is filled then.  Called by vCPU
     * threads, several at once. */
    bool (*access)(struct vmm_window *window, uint32_t offset, uint8_t *data, uint32_t size,
                   bool write, struct vmm_access *told);
    struct vmm_bus *bus; /* NULL: on none */
    uint64_t base;
    uint32_t size;
    int space;
};

enum bus_outcome { BUS_DONE, BUS_TOLD, BUS_LOST };

enum bus_outcome bus_access(struct vmm_bus *bus, int space, uint64_t address, uint8_t *data,
                            uint32_t size, bool write, struct vmm_access *told);

#endif
