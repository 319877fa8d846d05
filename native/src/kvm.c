/* The virtual machine: capabilities, memory slots, interrupt routes, notifications. */
#include "kvm.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static const struct {
    int number;
    const char *name;
} needed[] = {
    {KVM_CAP_IRQCHIP, "an irqchip in the kernel (KVM_CAP_IRQCHIP)"},
    {KVM_CAP_USER_MEMORY, "memory slots (KVM_CAP_USER_MEMORY)"},
    {KVM_CAP_IRQFD, "interrupts by eventfd (KVM_CAP_IRQFD)"},
    {KVM_CAP_IOEVENTFD, "notifications by eventfd (KVM_CAP_IOEVENTFD)"},
    {KVM_CAP_IOEVENTFD_ANY_LENGTH, "notifications of any length (KVM_CAP_IOEVENTFD_ANY_LENGTH)"},
    {KVM_CAP_IRQ_ROUTING, "interrupt routes (KVM_CAP_IRQ_ROUTING)"},
    {KVM_CAP_SIGNAL_MSI, "message-signalled interrupts (KVM_CAP_SIGNAL_MSI)"},
    {KVM_CAP_IMMEDIATE_EXIT, "immediate exits (KVM_CAP_IMMEDIATE_EXIT)"},
    {KVM_CAP_EXT_CPUID, "CPUID (KVM_CAP_EXT_CPUID)"},
    {KVM_CAP_XSAVE, "extended CPU state (KVM_CAP_XSAVE)"},
    {KVM_CAP_VCPU_EVENTS, "vCPU events (KVM_CAP_VCPU_EVENTS)"},
    {KVM_CAP_ADJUST_CLOCK, "the clock (KVM_CAP_ADJUST_CLOCK)"},
};

int kvm_ioctl(int fd, unsigned long request, void *argument)
{
    int result;

    do
        result = ioctl(fd, request, argument);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

static int kvm_ioctl_number(int fd, unsigned long request, unsigned long argument)
{
    return kvm_ioctl(fd, request, (void *)argument);
}

int vmm_kvm_check(int kvm_fd, const char **missing)
{
    *missing = "the API of version 12";
    if (kvm_ioctl_number(kvm_fd, KVM_GET_API_VERSION, 0) != 12)
        return -ENOSYS;
    for (size_t i = 0; i < ARRAY_SIZE(needed); i++) {
        *missing = needed[i].name;
        if (kvm_ioctl_number(kvm_fd, KVM_CHECK_EXTENSION, (unsigned long)needed[i].number) <= 0)
            return -ENOSYS;
    }
    *missing = NULL;
    return 0;
}

int vmm_kvm_cpuid(int kvm_fd, struct vmm_cpuid *out, uint32_t max)
{
    struct kvm_cpuid2 *found = calloc(1, sizeof(*found) + max * sizeof(found->entries[0]));

    if (!found)
        return -ENOMEM;
    found->nent = max;
    int result = kvm_ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, found);
    for (uint32_t i = 0; result >= 0 && i < found->nent; i++) {
        const struct kvm_cpuid_entry2 *e = &found->entries[i];
        out[i] = (struct vmm_cpuid){.function = e->function,
                                    .index = e->index,
                                    .flags = e->flags,
                                    .eax = e->eax,
                                    .ebx = e->ebx,
                                    .ecx = e->ecx,
                                    .edx = e->edx};
    }
    if (result >= 0)
        result = (int)found->nent;
    free(found);
    return result;
}

/* Linux looks for AGP bridges by the ports of PCI's mechanism 1, twice, on all buses, whether they
 * are there or not.  Here they are not: KVM keeps the writes to the address port to itself, which
 * is half of those 32768 exits. */
static void ignore_config_address(struct vmm_vm *vm)
{
    struct kvm_coalesced_mmio_zone zone = {.addr = 0xcf8, .size = 4, .pio = 1};

    /* Without KVM_CAP_COALESCED_PIO it costs exits, nothing else. */
    kvm_ioctl(vm->fd, KVM_REGISTER_COALESCED_MMIO, &zone);
}

static int set_slots(struct vmm_vm *vm, uint32_t flags)
{
    for (uint32_t slot = 0; slot < vm->memory->count; slot++) {
        const struct vhost_region *r = vm->memory->region[slot];
        struct kvm_userspace_memory_region region = {.slot = slot,
                                                     .flags = flags,
                                                     .guest_phys_addr = r->guest_addr,
                                                     .memory_size = r->size,
                                                     .userspace_addr = (uintptr_t)r->host};
        int err = kvm_ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
        if (err < 0)
            return err;
    }
    return 0;
}

static int create(struct vmm_vm *vm)
{
    uint64_t identity = KVM_IDENTITY_MAP;

    vm->fd = kvm_ioctl_number(vm->kvm_fd, KVM_CREATE_VM, 0);
    if (vm->fd < 0)
        return vm->fd;
    vm->run_size = kvm_ioctl_number(vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (vm->run_size < 0)
        return vm->run_size;
    /* First: once KVM has put a device on a bus, it keeps a slot waiting until nobody can still see
     * the old bus (SRCU), which takes 5 to 10 ms of a start. */
    int err = set_slots(vm, 0);
    if (err == 0)
        err = kvm_ioctl(vm->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity);
    if (err == 0)
        err = kvm_ioctl_number(vm->fd, KVM_SET_TSS_ADDR, KVM_TSS);
    if (err == 0)
        err = kvm_ioctl_number(vm->fd, KVM_CREATE_IRQCHIP, 0);
    /* 32-bit APIC ids in MSI routes, as the guest's x2APICs have them. */
    struct kvm_enable_cap x2apic = {
        .cap = KVM_CAP_X2APIC_API,
        .args = {KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK}};
    if (err == 0 && kvm_ioctl_number(vm->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_X2APIC_API) > 0)
        err = kvm_ioctl(vm->fd, KVM_ENABLE_CAP, &x2apic);
    if (err == 0)
        ignore_config_address(vm);
    return err;
}

int vmm_vm_new(int kvm_fd, struct vmm_bus *bus, struct vhost_events *events,
               struct vhost_memory *memory, struct vmm_vm **out)
{
    struct vmm_vm *vm = calloc(1, sizeof(*vm));

    if (!vm)
        return -ENOMEM;
    *vm =
        (struct vmm_vm){.kvm_fd = kvm_fd, .fd = -1, .bus = bus, .events = events, .memory = memory};
    memory_ref(memory);
    int err = create(vm);
    if (err == 0)
        err = vmm_vm_set_routes(vm, NULL, 0);
    if (err < 0) {
        vmm_vm_free(vm);
        return err;
    }
    *out = vm;
    return 0;
}

void vmm_vm_free(struct vmm_vm *vm)
{
    if (!vm)
        return;
    if (vm->fd >= 0)
        close(vm->fd);
    vhost_memory_unref(vm->memory);
    free(vm);
}

int vmm_vm_log_dirty(struct vmm_vm *vm, bool on)
{
    return set_slots(vm, on ? KVM_MEM_LOG_DIRTY_PAGES : 0);
}

int vmm_vm_take_dirty(struct vmm_vm *vm, uint32_t index, void *bits)
{
    struct kvm_dirty_log log = {.slot = index, .dirty_bitmap = bits};

    if (index >= vm->memory->count)
        return -ERANGE;
    return kvm_ioctl(vm->fd, KVM_GET_DIRTY_LOG, &log);
}

/* The pins of the I/O APIC alone: the ACPI tables know of no 8259. */
static void route_pins(struct kvm_irq_routing *table)
{
    for (uint32_t pin = 0; pin < IOAPIC_PINS; pin++) {
        table->entries[table->nr++] = (struct kvm_irq_routing_entry){
            .gsi = pin, .type = KVM_IRQ_ROUTING_IRQCHIP, .u.irqchip = {KVM_IRQCHIP_IOAPIC, pin}};
    }
}

int vmm_vm_set_routes(struct vmm_vm *vm, const struct vmm_route *routes, uint32_t count)
{
    struct kvm_irq_routing *table =
        calloc(1, sizeof(*table) + (IOAPIC_PINS + (size_t)count) * sizeof(table->entries[0]));

    if (!table)
        return -ENOMEM;
    route_pins(table);
    for (uint32_t i = 0; i < count; i++)
        table->entries[table->nr++] =
            (struct kvm_irq_routing_entry){.gsi = routes[i].gsi,
                                           .type = KVM_IRQ_ROUTING_MSI,
                                           .u.msi = {.address_lo = (uint32_t)routes[i].address,
                                                     .address_hi = routes[i].address >> 32,
                                                     .data = routes[i].data}};
    int err = kvm_ioctl(vm->fd, KVM_SET_GSI_ROUTING, table);
    free(table);
    return err;
}

int vmm_vm_irqfd(struct vmm_vm *vm, int fd, uint32_t gsi, bool assign)
{
    struct kvm_irqfd irqfd = {
        .fd = (uint32_t)fd, .gsi = gsi, .flags = assign ? 0 : KVM_IRQFD_FLAG_DEASSIGN};

    return kvm_ioctl(vm->fd, KVM_IRQFD, &irqfd);
}

int vmm_vm_ioeventfd(struct vmm_vm *vm, int fd, int space, uint64_t address, uint32_t size,
                     bool match, uint64_t value, bool assign)
{
    struct kvm_ioeventfd notify = {
        .fd = fd,
        .addr = address,
        .len = size,
        .datamatch = value,
        .flags = (space == VMM_SPACE_PIO ? KVM_IOEVENTFD_FLAG_PIO : 0) |
                 (match ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0) |
                 (assign ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN),
    };

    return kvm_ioctl(vm->fd, KVM_IOEVENTFD, &notify);
}
