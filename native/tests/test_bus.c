/* Where windows lie, what they answer at their edges, and accesses while they come and go. */
#include "window.h"
#include <pthread.h>
#include <stdatomic.h>

enum { MMIO = VMM_SPACE_MMIO, PIO = VMM_SPACE_PIO };

static void nothing_reads_as_all_ones(void)
{
    struct vmm_bus *bus = new_bus();

    for (uint32_t size = 1; size <= 8; size++) {
        uint64_t want = size == 8 ? UINT64_MAX : (1ull << 8 * size) - 1;
        CHECK(bus_read(bus, MMIO, 0x1000, size) == want);
        CHECK(bus_read(bus, MMIO, UINT64_MAX, size) == want);
        CHECK(bus_read(bus, PIO, 0x80, size) == want);
        quiet_write(bus, PIO, 0x80, size, 0);
    }
    vmm_bus_free(bus);
}

static void sizes_and_spaces_are_checked(void)
{
    struct vmm_bus *bus = new_bus();
    struct vmm_access told;
    uint8_t data[16] = {0};

    CHECK_EQ(vmm_bus_access(bus, MMIO, 0, data, 0, false, &told), -EINVAL);
    CHECK_EQ(vmm_bus_access(bus, MMIO, 0, data, 9, false, &told), -EINVAL);
    CHECK_EQ(vmm_bus_access(bus, 2, 0, data, 1, false, &told), -EINVAL);
    CHECK_EQ(vmm_bus_access(bus, -1, 0, data, 1, false, &told), -EINVAL);
    vmm_bus_free(bus);
}

static void windows_do_not_overlap(void)
{
    struct vmm_bus *bus = new_bus();
    struct vmm_window *first = plain_window(1, 16), *second = plain_window(2, 16);

    CHECK_EQ(vmm_bus_place(bus, first, MMIO, 0x100), 0);
    CHECK_EQ(vmm_bus_place(bus, first, MMIO, 0x200), -EBUSY);
    for (uint64_t base = 0xf1; base < 0x110; base++)
        CHECK_EQ(vmm_bus_place(bus, second, MMIO, base), -EEXIST);
    CHECK_EQ(vmm_bus_place(bus, second, MMIO, 0xf0), 0);
    vmm_bus_remove(bus, second);
    vmm_bus_remove(bus, second);
    CHECK_EQ(vmm_bus_place(bus, second, MMIO, 0x110), 0);
    vmm_bus_remove(bus, second);
    CHECK_EQ(vmm_bus_place(bus, second, PIO, 0x100), 0);
    vmm_bus_remove(bus, first);
    vmm_bus_remove(bus, second);
    vmm_window_free(first);
    vmm_window_free(second);
    vmm_bus_free(bus);
}

static void a_window_ends_with_its_space(void)
{
    struct vmm_bus *bus = new_bus();
    struct vmm_window *window = plain_window(1, 16);

    CHECK_EQ(vmm_bus_place(bus, window, PIO, 0xfff1), -EINVAL);
    CHECK_EQ(vmm_bus_place(bus, window, MMIO, UINT64_MAX - 14), -EINVAL);
    CHECK_EQ(vmm_bus_place(bus, window, MMIO, UINT64_MAX), -EINVAL);
    CHECK_EQ(vmm_bus_place(bus, window, 2, 0), -EINVAL);
    CHECK_EQ(vmm_bus_place(bus, window, PIO, 0xfff0), 0);
    vmm_bus_remove(bus, window);
    CHECK_EQ(vmm_bus_place(bus, window, MMIO, UINT64_MAX - 15), 0);
    quiet_write(bus, MMIO, UINT64_MAX - 7, 8, 0x1122334455667788);
    CHECK_EQ(bus_read(bus, MMIO, UINT64_MAX, 1), 0x11);
    CHECK_EQ(bus_read(bus, MMIO, UINT64_MAX, 2), 0xffff);
    vmm_bus_remove(bus, window);
    vmm_window_free(window);
    vmm_bus_free(bus);
}

/* An access is of one window whole, or of none. */
static void straddling_accesses_are_lost(void)
{
    struct vmm_bus *bus = new_bus();
    struct vmm_window *first = plain_window(1, 6), *second = plain_window(2, 6);

    CHECK_EQ(vmm_bus_place(bus, first, MMIO, 0x10), 0);
    CHECK_EQ(vmm_bus_place(bus, second, MMIO, 0x16), 0);
    for (uint64_t at = 0x8; at < 0x20; at++) {
        for (uint32_t size = 1; size <= 8; size++) {
            uint64_t ones = size == 8 ? UINT64_MAX : (1ull << 8 * size) - 1;
            bool whole = (at >= 0x10 && at + size <= 0x16) || (at >= 0x16 && at + size <= 0x1c);
            quiet_write(bus, MMIO, at, size, 0x5a5a5a5a5a5a5a5a);
            uint64_t found = bus_read(bus, MMIO, at, size);
            CHECK(found == (whole ? ones & 0x5a5a5a5a5a5a5a5a : ones));
            uint8_t zero[6] = {0}, stored[12];
            CHECK_EQ(vmm_window_load(first, 0, 0, stored, 6), 0);
            CHECK_EQ(vmm_window_load(second, 0, 0, stored + 6, 6), 0);
            for (uint64_t byte = 0; byte < 12; byte++) {
                bool written = whole && byte + 0x10 >= at && byte + 0x10 < at + size;
                CHECK_EQ(stored[byte], written ? 0x5a : 0);
            }
            CHECK_EQ(vmm_window_store(first, 0, 0, zero, 6), 0);
            CHECK_EQ(vmm_window_store(second, 0, 0, zero, 6), 0);
        }
    }
    vmm_bus_remove(bus, first);
    vmm_bus_remove(bus, second);
    vmm_window_free(first);
    vmm_window_free(second);
    vmm_bus_free(bus);
}

static void many_windows_are_found(void)
{
    enum { COUNT = 300 };
    struct vmm_bus *bus = new_bus();
    struct vmm_window *window[COUNT];

    for (uint32_t i = 0; i < COUNT; i++) {
        uint32_t at = i * 7 % COUNT; /* 7 does not divide 300: each place once */
        window[at] = plain_window(at, 4);
        CHECK_EQ(vmm_window_store(window[at], 0, 0, &at, 4), 0);
        CHECK_EQ(vmm_bus_place(bus, window[at], MMIO, 0x10ull * at), 0);
    }
    for (uint32_t i = 0; i < COUNT; i += 2)
        vmm_bus_remove(bus, window[i]);
    for (uint32_t i = 0; i < COUNT; i++) {
        CHECK_EQ(bus_read(bus, MMIO, 0x10ull * i, 4), i % 2 ? i : 0xffffffff);
        CHECK_EQ(bus_read(bus, MMIO, 0x10ull * i + 4, 4), 0xffffffff);
    }
    /* The bus may go first. */
    vmm_bus_free(bus);
    for (uint32_t i = 0; i < COUNT; i++)
        vmm_window_free(window[i]);
}

enum { MOVES = 2000, THREADS = 2, WINDOWS = 4 };

struct traffic {
    struct vmm_bus *bus;
    atomic_bool end;
    atomic_ulong hits;
};

static void *drive(void *arg)
{
    struct traffic *t = arg;
    uint32_t n = 0;

    while (!atomic_load(&t->end)) {
        struct vmm_access told;
        uint64_t value = n;
        uint64_t address = 0x20 * (n % (2 * WINDOWS)) + n % 31;
        uint32_t size = 1 + n % 8;
        bool write = n & 1;
        int outcome = vmm_bus_access(t->bus, MMIO, address, (uint8_t *)&value, size, write, &told);
        CHECK(outcome == 0 || outcome == 1);
        if (outcome) {
            CHECK(told.token >= 1 && told.token <= WINDOWS);
            CHECK_EQ(told.size, size);
            CHECK(told.row < 3);
            atomic_fetch_add(&t->hits, 1);
        }
        n++;
    }
    return NULL;
}

static struct vmm_window *banked_window(uint64_t token)
{
    struct sketch s;

    sketch_init(&s, token, 32);
    memset(s.writable, 0xff, 32);
    memset(s.flags, VMM_TELL_WRITE | VMM_TELL_READ, 32);
    s.config.num_banks = 1;
    s.config.bank[0] =
        (struct vmm_bank){.offset = 8, .size = 16, .selector = 0, .selector_size = 1, .rows = 3};
    return sketch_window(&s);
}

static void windows_move_under_traffic(void)
{
    struct traffic t = {.bus = new_bus()};
    struct vmm_window *window[WINDOWS];
    pthread_t thread[THREADS];
    uint8_t data[16];

    for (uint32_t i = 0; i < WINDOWS; i++)
        window[i] = banked_window(1 + i);
    for (int i = 0; i < THREADS; i++)
        CHECK_EQ(pthread_create(&thread[i], NULL, drive, &t), 0);
    for (uint32_t n = 0; n < MOVES || atomic_load(&t.hits) == 0; n++) {
        uint32_t i = n % WINDOWS;
        vmm_bus_remove(t.bus, window[i]);
        if (n % 16 == 0) {
            vmm_window_free(window[i]);
            window[i] = banked_window(1 + i);
        }
        int err = vmm_bus_place(t.bus, window[i], MMIO, 0x20 * (n * 5 % (2 * WINDOWS)));
        CHECK(err == 0 || err == -EEXIST);
        memset(data, (int)n, sizeof(data));
        CHECK_EQ(vmm_window_store(window[i], n % 3, 8, data, 16), 0);
        CHECK_EQ(vmm_window_set_bits(window[i], 0, data, 2), 0);
        CHECK_EQ(vmm_window_load(window[i], n % 3, 8, data, 16), 0);
    }
    atomic_store(&t.end, true);
    for (int i = 0; i < THREADS; i++)
        CHECK_EQ(pthread_join(thread[i], NULL), 0);
    for (uint32_t i = 0; i < WINDOWS; i++) {
        vmm_bus_remove(t.bus, window[i]);
        vmm_window_free(window[i]);
    }
    vmm_bus_free(t.bus);
}

static const struct test tests[] = {
    TEST(nothing_reads_as_all_ones),    TEST(sizes_and_spaces_are_checked),
    TEST(windows_do_not_overlap),       TEST(a_window_ends_with_its_space),
    TEST(straddling_accesses_are_lost), TEST(many_windows_are_found),
    TEST(windows_move_under_traffic),
};

MAIN(tests)
