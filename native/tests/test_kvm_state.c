/*
 * The state of a virtual machine, as it was saved and as somebody else wrote it: KVM takes it, or
 * there is an errno.  Where KVM cannot be used nothing is tested, and said so.
 */
#include "window.h"
#include <fcntl.h>
#include <unistd.h>

enum { CPUID_MAX = 256, ROOM = 1 << 17, CHANGES = 2000, HEAD = 8 };

static struct vmm_bus *bus;
static struct vhost_events *events;
static struct vhost_memory *memory;
static struct vmm_vm *vm;
static struct vmm_vcpu *vcpu;
static uint64_t seed;

static void begin(int kvm)
{
    struct vmm_cpuid cpuid[CPUID_MAX];
    int count = vmm_kvm_cpuid(kvm, cpuid, CPUID_MAX);

    CHECK(count > 0);
    bus = new_bus();
    CHECK_EQ(vhost_events_new(&events), 0);
    CHECK_EQ(vhost_memory_new(NULL, 0, &memory), 0);
    CHECK_EQ(vmm_vm_new(kvm, bus, events, memory, &vm), 0);
    CHECK_EQ(vmm_vcpu_new(vm, 0, 1, cpuid, (uint32_t)count, &vcpu), 0);
    seed = 1;
}

static void end(void)
{
    vmm_vcpu_free(vcpu);
    vmm_vm_free(vm);
    vhost_memory_unref(memory);
    vhost_events_free(events);
    vmm_bus_free(bus);
}

static int kvm_fd(void)
{
    int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    const char *missing;

    if (fd >= 0 && vmm_kvm_check(fd, &missing) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static uint64_t draw(uint64_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % below;
}

struct state {
    uint64_t size;
    uint8_t data[ROOM];
};

static void save(bool of_vcpu, struct state *out)
{
    int64_t size = of_vcpu ? vmm_vcpu_save(vcpu, NULL, 0) : vmm_vm_save(vm, NULL, 0);

    CHECK(size > HEAD && size <= ROOM);
    CHECK_EQ(of_vcpu ? vmm_vcpu_save(vcpu, out->data, 1) : vmm_vm_save(vm, out->data, 1), -ENOSPC);
    size = of_vcpu ? vmm_vcpu_save(vcpu, out->data, ROOM) : vmm_vm_save(vm, out->data, ROOM);
    CHECK(size > HEAD && size <= ROOM);
    out->size = (uint64_t)size;
}

/* From a block of just that size: a read beyond its end is a fault. */
static int load(bool of_vcpu, const uint8_t *data, uint64_t size)
{
    void *exact = malloc(size ? size : 1);

    CHECK(exact != NULL);
    memcpy(exact, data, size);
    int err = of_vcpu ? vmm_vcpu_load(vcpu, exact, size) : vmm_vm_load(vm, exact, size);
    free(exact);
    CHECK(err <= 0 && err > -4096);
    return err;
}

/* Where the record that begins at `at` ends. */
static uint64_t next(const struct state *s, uint64_t at)
{
    uint32_t size;

    memcpy(&size, s->data + at + 4, sizeof(size));
    return at + HEAD + size;
}

static bool is_border(const struct state *s, uint64_t size)
{
    uint64_t at = 0;

    while (at < size)
        at = next(s, at);
    return at == size;
}

static void both(void (*check)(bool of_vcpu))
{
    int kvm = kvm_fd();

    begin(kvm);
    check(false);
    check(true);
    end();
    close(kvm);
}

static void check_own(bool of_vcpu)
{
    static struct state before, after;

    save(of_vcpu, &before);
    CHECK_EQ(load(of_vcpu, before.data, before.size), 0);
    save(of_vcpu, &after);
    CHECK_EQ(after.size, before.size);
}

static void what_was_saved_is_taken(void)
{
    both(check_own);
}

static void check_borders(bool of_vcpu)
{
    static struct state s;

    save(of_vcpu, &s);
    CHECK_EQ(load(of_vcpu, s.data, 0), -EINVAL);
    for (uint64_t size = 1; size < s.size; size += 1 + draw(40)) {
        int err = load(of_vcpu, s.data, size);
        if (!is_border(&s, size))
            CHECK_EQ(err, -EINVAL);
    }
    memset(s.data + s.size, 0, HEAD);
    CHECK_EQ(load(of_vcpu, s.data, s.size + 1), -EINVAL);
    CHECK_EQ(load(of_vcpu, s.data, s.size + HEAD), -EINVAL);
}

static void what_is_cut_off_is_refused(void)
{
    both(check_borders);
}

static void check_heads(bool of_vcpu)
{
    static const uint32_t sizes[] = {0, 1, 7, 0x7fffffff, 0xfffffff8, 0xffffffff};
    static struct state s;

    save(of_vcpu, &s);
    for (uint64_t at = 0; at < s.size; at = next(&s, at)) {
        uint8_t head[HEAD];
        memcpy(head, s.data + at, HEAD);
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            memcpy(s.data + at + 4, &sizes[i], 4);
            load(of_vcpu, s.data, s.size);
        }
        memcpy(s.data + at, head, HEAD);
        for (uint32_t kind = 0; kind < 32; kind++) {
            memcpy(s.data + at, &kind, 4);
            load(of_vcpu, s.data, s.size);
        }
        memset(s.data + at, 0xff, 4);
        CHECK(load(of_vcpu, s.data, s.size) < 0);
        memcpy(s.data + at, head, HEAD);
    }
    load(of_vcpu, s.data, s.size);
}

static void any_head_of_a_record(void)
{
    both(check_heads);
}

static void check_changes(bool of_vcpu)
{
    static struct state s, changed;

    save(of_vcpu, &s);
    for (int n = 0; n < CHANGES / (of_vcpu ? 4 : 1); n++) {
        changed = s;
        for (uint64_t left = 1 + draw(4); left; left--)
            changed.data[draw(s.size)] ^= (uint8_t)(1 << draw(8));
        load(of_vcpu, changed.data, s.size);
        /* All of one record is noise. */
        changed = s;
        uint64_t at = 0;
        for (uint64_t skip = draw(12); skip && next(&s, at) < s.size; skip--)
            at = next(&s, at);
        for (uint64_t i = at + HEAD; i < next(&s, at); i++)
            changed.data[i] = (uint8_t)draw(256);
        load(of_vcpu, changed.data, s.size);
    }
    save(of_vcpu, &changed);
}

static void any_contents_of_a_record(void)
{
    both(check_changes);
}

static void check_noise(bool of_vcpu)
{
    static uint8_t noise[512];

    for (int n = 0; n < CHANGES; n++) {
        uint64_t size = draw(sizeof(noise));
        for (uint64_t i = 0; i < size; i++)
            noise[i] = (uint8_t)draw(i % HEAD ? 2 : 24);
        load(of_vcpu, noise, size);
    }
}

static void noise(void)
{
    both(check_noise);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(what_was_saved_is_taken),
        TEST(what_is_cut_off_is_refused),
        TEST(any_head_of_a_record),
        TEST(any_contents_of_a_record),
        TEST(noise),
    };
    int kvm = kvm_fd();

    if (kvm < 0) {
        printf("1..0 # SKIP no usable KVM here\n");
        return 0;
    }
    close(kvm);
    return run_tests(tests, sizeof(tests) / sizeof(tests[0]), argc, argv);
}
