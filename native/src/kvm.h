/* What the files of the KVM machine know of each other. */
#ifndef VMM_KVM_H
#define VMM_KVM_H

#include "bus.h"
#include <linux/kvm.h>

#define KVM_IDENTITY_MAP 0xfffbc000u /* what KVM on Intel needs for itself */
#define KVM_TSS 0xfffbd000u

enum { IOAPIC_PINS = 24 };

struct vmm_vm {
    int kvm_fd;
    int fd;
    int run_size; /* bytes of a vCPU's struct kvm_run */
    struct vmm_bus *bus;
    struct vhost_events *events;
    struct vhost_memory *memory;
};

enum vcpu_wish { VCPU_STAND, VCPU_RUN, VCPU_END };

struct vmm_vcpu {
    struct vmm_vm *vm;
    uint64_t token;
    uint32_t apic_id;
    int fd;
    struct kvm_run *run;
    struct kvm_coalesced_mmio_ring *ignored; /* writes to ports that nothing answers */
    struct kvm_cpuid2 *cpuid;

    pthread_t thread;
    bool has_thread;
    int cpu;
    atomic_int tid;
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t changed;
    enum vcpu_wish wish;
    bool pause_unanswered;
    bool waits; /* for the control thread's answer to `told` */
    struct vmm_access told;
    uint64_t answer;
    bool over; /* it reported its exit: nothing but its end is left */

    struct vmm_vcpu_stats stats;
};

/* Returns ioctl's result or negative errno; EINTR is tried again. */
int kvm_ioctl(int fd, unsigned long request, void *argument);

#endif
