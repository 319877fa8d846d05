/*
 * The machine half of libvhost: a KVM virtual machine, its vCPU threads, and the registers that
 * its guest sees.
 *
 * A device's registers are a *window* of one of the guest's two address spaces.  What a window is
 * made of is data: initial bytes, the bits that the guest may change, banks that a selector
 * register switches, and which accesses the control thread is told of.  The vCPU threads answer
 * everything else from the stored bytes, so that probing a bus, sizing BARs or reading features
 * never leaves this library.  A vCPU whose access is told waits for the answer.
 *
 * Conventions as in libvhost.h: 0 or a negative errno; descriptors stay the caller's; functions
 * may be called from one control thread at a time.
 *
 * Sources: Linux, Documentation/virt/kvm/api.rst; National Semiconductor PC16550D.
 */
#ifndef LIBVMM_H
#define LIBVMM_H

#include <libvhost.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef begin */

enum vmm_space {
    VMM_SPACE_MMIO = 0,
    VMM_SPACE_PIO = 1,
};

/* ---- registers ---- */

enum vmm_register_flag {
    VMM_TELL_WRITE = 1,       /* each write is told, after its writable bits were stored */
    VMM_TELL_CHANGE = 2,      /* a write that changed a stored bit */
    VMM_TELL_READ = 4,        /* each read: the answer is what the guest reads */
    VMM_WRITE_ONE_CLEARS = 8, /* writable bits that are written as one become zero */
    VMM_ACKNOWLEDGES = 16,    /* the same, in the register of four bytes before; stores nothing */
};

enum vmm_window_limit {
    VMM_WINDOW_BANKS = 4,
    VMM_WINDOW_MAX = 65536, /* bytes */
};

/* `size` bytes at `offset` that exist `rows` times; the register of `selector_size` bytes at
 * `selector` chooses.  Beyond the last row they read as zero and cannot be written. */
struct vmm_bank {
    uint32_t offset;
    uint32_t size;
    uint32_t selector;
    uint32_t selector_size;
    uint32_t rows;
};

struct vmm_window_config {
    uint64_t token; /* names the window in told accesses */
    uint32_t size;
    uint32_t num_banks;
    const uint8_t *initial;  /* size bytes; of every row alike where banked */
    const uint8_t *writable; /* size bytes: the bits that the guest may change */
    const uint8_t *flags;    /* size bytes of enum vmm_register_flag */
    struct vmm_bank bank[VMM_WINDOW_BANKS];
};

/* One access by the guest that the control thread has to answer. */
struct vmm_access {
    uint64_t token; /* the window's */
    uint64_t value; /* what was written, or what is stored; little endian */
    uint32_t offset;
    uint32_t row; /* of the first told byte that is banked, or 0 */
    uint32_t size;
    bool write;
};

struct vmm_bus;
struct vmm_window;

int vmm_bus_new(struct vmm_bus **out);
void vmm_bus_free(struct vmm_bus *bus);
/* -EINVAL: banks that overlap or leave the window. */
int vmm_window_new(const struct vmm_window_config *config, struct vmm_window **out);
/* Only when it is on no bus. */
void vmm_window_free(struct vmm_window *window);
/* -EEXIST: something is there already; -EBUSY: it is on a bus; -EINVAL: the addresses wrap. */
int vmm_bus_place(struct vmm_bus *bus, struct vmm_window *window, int space, uint64_t base);
void vmm_bus_remove(struct vmm_bus *bus, struct vmm_window *window);
/* The stored bytes of a row (0 where not banked). -ERANGE: outside of the window. */
int vmm_window_store(struct vmm_window *window, uint32_t row, uint32_t offset, const void *data,
                     uint32_t size);
/* Sets the bits of `data` in row 0, at once for the guest. */
int vmm_window_set_bits(struct vmm_window *window, uint32_t offset, const void *data,
                        uint32_t size);
int vmm_window_load(struct vmm_window *window, uint32_t row, uint32_t offset, void *data,
                    uint32_t size);
/* An access as a vCPU makes it, for tests.  1: told, `told` says what; 0: done; -EINVAL: no such
 * space, or not 1 to 8 bytes.  What no window holds whole reads as all ones, and a write to it is
 * lost. */
int vmm_bus_access(struct vmm_bus *bus, int space, uint64_t address, uint8_t *data, uint32_t size,
                   bool write, struct vmm_access *told);

/* ---- the 8250 ---- */

struct vmm_serial;

enum vmm_serial_limit {
    VMM_SERIAL_SIZE = 8,  /* ports */
    VMM_SERIAL_FIFO = 64, /* bytes that wait for the guest */
};

struct vmm_serial_stats {
    uint64_t sent;     /* bytes that the guest wrote */
    uint64_t dropped;  /* of these: nobody had room */
    uint64_t received; /* bytes given to the guest */
};

/* Registers and receive FIFO. */
struct vmm_serial_state {
    uint8_t ier;
    uint8_t lcr;
    uint8_t mcr;
    uint8_t scr;
    uint8_t fcr;
    uint8_t sent; /* the transmitter's interrupt is pending */
    uint8_t divisor[2];
    uint32_t head;
    uint32_t count;
    uint8_t fifo[VMM_SERIAL_FIFO];
};

/* What the guest sends is written to `out_fd`, which must not block; its interrupt is `irq_fd`;
 * `room_fd` is signalled when the FIFO is empty again, after bytes for the guest had no room
 * (eventfds). */
int vmm_serial_new(int out_fd, int irq_fd, int room_fd, struct vmm_serial **out);
/* Only when its window is on no bus. */
void vmm_serial_free(struct vmm_serial *serial);
/* To be placed; it is freed with the serial port. */
struct vmm_window *vmm_serial_window(struct vmm_serial *serial);
/* Gives bytes to the guest; returns how many had room: none in loopback. */
uint32_t vmm_serial_receive(struct vmm_serial *serial, const uint8_t *data, uint32_t size);
void vmm_serial_reset(struct vmm_serial *serial);
void vmm_serial_save(struct vmm_serial *serial, struct vmm_serial_state *out);
/* -EINVAL: no state that a port can have. */
int vmm_serial_load(struct vmm_serial *serial, const struct vmm_serial_state *state);
void vmm_serial_read_stats(const struct vmm_serial *serial, struct vmm_serial_stats *out);

/* ---- events, on the list of struct vhost_events ---- */

enum vmm_event_kind {
    VMM_EVENT_ACCESS = 16, /* the vCPU with this token waits: vmm_vcpu_access, vmm_vcpu_answer */
    VMM_EVENT_EXIT = 17,   /* the vCPU with this token ended: value = enum vmm_exit, result */
    VMM_EVENT_PAUSED = 18, /* the vCPU with this token stands still */
};

enum vmm_exit {
    VMM_EXIT_TRIPLE_FAULT = 1,
    VMM_EXIT_SYSTEM = 2,         /* result: KVM's type of system event */
    VMM_EXIT_FAIL_ENTRY = 3,     /* result: the hardware's reason */
    VMM_EXIT_INTERNAL_ERROR = 4, /* result: KVM's suberror */
    VMM_EXIT_UNKNOWN = 5,        /* result: KVM's exit reason */
    VMM_EXIT_ERROR = 6,          /* result: negative errno of KVM_RUN */
};

/* ---- the virtual machine ---- */

struct vmm_vm;

/* A message-signalled interrupt behind a GSI. */
struct vmm_route {
    uint32_t gsi;
    uint32_t data;
    uint64_t address;
};

struct vmm_cpuid {
    uint32_t function;
    uint32_t index;
    uint32_t flags;
    uint32_t eax;
    uint32_t ebx;
    uint32_t ecx;
    uint32_t edx;
};

/* KVM's API version must be 12 and what the machine needs of it be there: -ENOSYS otherwise, with
 * the name of the first capability that lacks in `missing`. */
int vmm_kvm_check(int kvm_fd, const char **missing);
/* What KVM can show to a guest; returns how many entries. -E2BIG: more than `max`. */
int vmm_kvm_cpuid(int kvm_fd, struct vmm_cpuid *out, uint32_t max);

/* A new empty file in memory, of transparent huge pages where it is as long as those, or an error:
 * -EPERM without CAP_SYS_ADMIN, -EINVAL where the kernel has no such pages. */
int vmm_ram_file(void);

/* A virtual machine with local APICs and an I/O APIC in the kernel.  Every region of `memory` is
 * RAM of the guest's; it is held until the end. */
int vmm_vm_new(int kvm_fd, struct vmm_bus *bus, struct vhost_events *events,
               struct vhost_memory *memory, struct vmm_vm **out);
/* Its vCPUs have been freed before. */
void vmm_vm_free(struct vmm_vm *vm);
/* Has KVM note the pages that vCPUs write, or no more. */
int vmm_vm_log_dirty(struct vmm_vm *vm, bool on);
/* Takes what was noted of region `index` of the memory out: page n of it is bit n % 8 of byte n
 * / 8. `bits` has room for whole 64-bit words. -ERANGE: no such region. */
int vmm_vm_take_dirty(struct vmm_vm *vm, uint32_t index, void *bits);
/* Replaces all MSI routes; the pins of the I/O APIC are GSIs 0 to 23. */
int vmm_vm_set_routes(struct vmm_vm *vm, const struct vmm_route *routes, uint32_t count);
int vmm_vm_irqfd(struct vmm_vm *vm, int fd, uint32_t gsi, bool assign);
/* Writes of `size` bytes (0 = any, MMIO only) at `address` signal `fd`; only those of `value` where
 * `match`. */
int vmm_vm_ioeventfd(struct vmm_vm *vm, int fd, int space, uint64_t address, uint32_t size,
                     bool match, uint64_t value, bool assign);

/* ---- vCPUs ---- */

struct vmm_vcpu;

/* A segment register; the fields are those of struct kvm_segment. */
struct vmm_segment {
    uint64_t base;
    uint32_t limit; /* in bytes */
    uint16_t selector;
    uint8_t type;
    uint8_t present;
    uint8_t dpl;
    uint8_t db;
    uint8_t s;
    uint8_t l;
    uint8_t g;
    uint8_t avl;
};

/* How the boot processor begins, past real mode; data goes into ds, es, fs, gs and ss. */
struct vmm_entry {
    uint64_t rip;
    uint64_t rsi;
    uint64_t rbx;
    uint64_t cr0;
    uint64_t cr3;
    uint64_t cr4;
    uint64_t efer;
    uint64_t gdt_base;
    uint16_t gdt_limit;
    struct vmm_segment code;
    struct vmm_segment data;
    struct vmm_segment task;
};

struct vmm_vcpu_stats {
    uint64_t exits;
    uint64_t mmio;
    uint64_t pio;
    uint64_t told;   /* accesses that the control thread answered */
    uint64_t lost;   /* accesses to nothing */
    uint64_t run_ns; /* CPU time of the thread */
};

int vmm_vcpu_new(struct vmm_vm *vm, uint32_t apic_id, uint64_t token, const struct vmm_cpuid *cpuid,
                 uint32_t count, struct vmm_vcpu **out);
/* Ends its thread, whatever it does, and frees it. */
void vmm_vcpu_free(struct vmm_vcpu *vcpu);
int vmm_vcpu_set_entry(struct vmm_vcpu *vcpu, const struct vmm_entry *entry);
/* Starts the thread; it stands still until it is resumed.  `cpu`: pinned there, or -1. */
int vmm_vcpu_start(struct vmm_vcpu *vcpu, int cpu);
int vmm_vcpu_tid(const struct vmm_vcpu *vcpu);
/* VMM_EVENT_PAUSED follows; an access that is under way is completed before. */
void vmm_vcpu_pause(struct vmm_vcpu *vcpu);
void vmm_vcpu_resume(struct vmm_vcpu *vcpu);
/* The access that the vCPU waits for. -EINVAL: none. */
int vmm_vcpu_access(struct vmm_vcpu *vcpu, struct vmm_access *out);
/* Lets it go on; `value` is what a read finds. */
int vmm_vcpu_answer(struct vmm_vcpu *vcpu, uint64_t value);
void vmm_vcpu_read_stats(const struct vmm_vcpu *vcpu, struct vmm_vcpu_stats *out);

/* ---- state, while all vCPUs stand still ---- */

/* A sequence of records that only the same functions read; returns its size. -ENOSPC: `size` is too
 * small (`size` 0 asks for what is needed). */
int64_t vmm_vcpu_save(struct vmm_vcpu *vcpu, void *data, uint64_t size);
/* -EINVAL: not such a sequence; else what KVM says of a value. */
int vmm_vcpu_load(struct vmm_vcpu *vcpu, const void *data, uint64_t size);
int64_t vmm_vm_save(struct vmm_vm *vm, void *data, uint64_t size);
int vmm_vm_load(struct vmm_vm *vm, const void *data, uint64_t size);

/* cdef end */

#ifdef __cplusplus
}
#endif
#endif
