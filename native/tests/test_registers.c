/* What a window of registers is told to do with each byte. */
#include "window.h"

enum { MMIO = VMM_SPACE_MMIO, SIZE = 32 };

static struct vmm_bus *bus;
static struct vmm_window *window;
static struct sketch sketch;

static void begin(void)
{
    bus = new_bus();
    sketch_init(&sketch, 7, SIZE);
}

static void placed(void)
{
    window = sketch_window(&sketch);
    CHECK_EQ(vmm_bus_place(bus, window, MMIO, 0), 0);
}

static void end(void)
{
    vmm_bus_remove(bus, window);
    vmm_window_free(window);
    vmm_bus_free(bus);
}

static uint64_t stored(uint32_t row, uint32_t offset, uint32_t size)
{
    uint64_t value = 0;

    CHECK_EQ(vmm_window_load(window, row, offset, &value, size), 0);
    return value;
}

static void only_writable_bits_change(void)
{
    begin();
    memcpy(sketch.initial, "\x0f\xf0\xaa\x55", 4);
    memcpy(sketch.writable, "\x00\xff\x3c\x81", 4);
    placed();
    quiet_write(bus, MMIO, 0, 4, 0xffffffff);
    CHECK_EQ(bus_read(bus, MMIO, 0, 4), 0xd5beff0f);
    quiet_write(bus, MMIO, 0, 4, 0);
    CHECK_EQ(bus_read(bus, MMIO, 0, 4), 0x5482000f);
    quiet_write(bus, MMIO, 1, 3, 0xffffff);
    CHECK_EQ(bus_read(bus, MMIO, 1, 2), 0xbeff);
    end();
}

static void told_writes_say_what_was_written(void)
{
    struct vmm_access told;

    begin();
    sketch.writable[4] = 0x0f;
    sketch.flags[4] = VMM_TELL_WRITE;
    placed();
    for (int again = 0; again < 2; again++) {
        CHECK_EQ(bus_write(bus, MMIO, 3, 3, 0xabcdef, &told), 1);
        CHECK_EQ(told.token, 7);
        CHECK_EQ(told.offset, 3);
        CHECK_EQ(told.size, 3);
        CHECK_EQ(told.row, 0);
        CHECK_EQ(told.value, 0xabcdef);
        CHECK(told.write);
        CHECK_EQ(stored(0, 3, 3), 0x000d00);
    }
    quiet_write(bus, MMIO, 5, 4, 1);
    quiet_write(bus, MMIO, 0, 4, 1);
    CHECK_EQ(bus_read(bus, MMIO, 4, 1), 0x0d);
    end();
}

static void told_changes_are_of_stored_bits(void)
{
    struct vmm_access told;

    begin();
    sketch.writable[0] = 1;
    sketch.flags[0] = VMM_TELL_CHANGE;
    placed();
    quiet_write(bus, MMIO, 0, 1, 0xfe);
    CHECK_EQ(bus_write(bus, MMIO, 0, 1, 0xff, &told), 1);
    quiet_write(bus, MMIO, 0, 1, 1);
    CHECK_EQ(bus_write(bus, MMIO, 0, 1, 0, &told), 1);
    end();
}

static void told_reads_hold_what_is_stored(void)
{
    struct vmm_access told;
    uint64_t value = UINT64_MAX;

    begin();
    memset(sketch.initial, 0x11, SIZE);
    sketch.flags[9] = VMM_TELL_READ;
    placed();
    CHECK_EQ(vmm_bus_access(bus, MMIO, 8, (uint8_t *)&value, 4, false, &told), 1);
    CHECK_EQ(told.value, 0x11111111);
    CHECK(!told.write);
    CHECK_EQ(bus_read(bus, MMIO, 10, 8), 0x1111111111111111);
    quiet_write(bus, MMIO, 9, 1, 1);
    end();
}

static void ones_clear(void)
{
    begin();
    memset(sketch.initial, 0xff, 4);
    memcpy(sketch.writable, "\xff\x0f\x00\xff", 4);
    memset(sketch.flags, VMM_WRITE_ONE_CLEARS, 4);
    placed();
    quiet_write(bus, MMIO, 0, 4, 0x00ffff81);
    CHECK_EQ(bus_read(bus, MMIO, 0, 4), 0xfffff07e);
    quiet_write(bus, MMIO, 0, 4, 0);
    CHECK_EQ(bus_read(bus, MMIO, 0, 4), 0xfffff07e);
    /* What cannot be written cannot be set either. */
    quiet_write(bus, MMIO, 0, 4, 0x81);
    CHECK_EQ(bus_read(bus, MMIO, 0, 4), 0xfffff07e);
    const uint8_t bits[] = {0x01, 0x03};
    CHECK_EQ(vmm_window_set_bits(window, 0, bits, 2), 0);
    CHECK_EQ(bus_read(bus, MMIO, 0, 4), 0xfffff37f);
    end();
}

static void one_register_acknowledges_another(void)
{
    struct vmm_access told;

    begin();
    memset(sketch.initial, 0x07, 4);
    sketch.writable[4] = 0x02;
    memset(sketch.flags + 4, VMM_ACKNOWLEDGES, 4);
    sketch.flags[5] |= VMM_TELL_WRITE;
    placed();
    quiet_write(bus, MMIO, 4, 1, 0xff);
    CHECK_EQ(bus_read(bus, MMIO, 0, 8), 0x07070705);
    quiet_write(bus, MMIO, 4, 1, 0);
    CHECK_EQ(bus_read(bus, MMIO, 0, 8), 0x07070705);
    CHECK_EQ(bus_write(bus, MMIO, 4, 4, UINT32_MAX, &told), 1);
    CHECK_EQ(bus_read(bus, MMIO, 0, 8), 0x07070705);
    end();
}

static void nothing_lies_before_the_first_register(void)
{
    begin();
    memset(sketch.writable, 0xff, 4);
    memset(sketch.flags, VMM_ACKNOWLEDGES, 4);
    placed();
    quiet_write(bus, MMIO, 0, 4, 0x12345678);
    CHECK_EQ(bus_read(bus, MMIO, 0, 4), 0x12345678);
    end();
}

static void bank(uint32_t offset, uint32_t size, uint32_t selector, uint32_t selector_size,
                 uint32_t rows)
{
    sketch.config.bank[sketch.config.num_banks++] = (struct vmm_bank){
        .offset = offset,
        .size = size,
        .selector = selector,
        .selector_size = selector_size,
        .rows = rows,
    };
}

static void rows_are_selected(void)
{
    begin();
    memset(sketch.writable, 0xff, SIZE);
    memset(sketch.initial + 8, 0x33, 8);
    bank(8, 8, 0, 2, 3);
    placed();
    for (uint32_t row = 0; row < 3; row++) {
        quiet_write(bus, MMIO, 0, 2, row);
        CHECK_EQ(bus_read(bus, MMIO, 8, 8), 0x3333333333333333);
        quiet_write(bus, MMIO, 10, 4, 0x1000 + row);
    }
    for (uint32_t row = 0; row < 3; row++) {
        quiet_write(bus, MMIO, 0, 2, row);
        CHECK_EQ(bus_read(bus, MMIO, 10, 4), 0x1000 + row);
        CHECK_EQ(stored(row, 10, 4), 0x1000 + row);
    }
    end();
}

static void beyond_the_last_row_is_nothing(void)
{
    struct vmm_access told;
    static const uint32_t rows[] = {2, 3, 255, 256, 0xffff, 0x10000, 0x7fffffff, UINT32_MAX};

    begin();
    memset(sketch.writable, 0xff, SIZE);
    memset(sketch.initial + 8, 0x33, 8);
    memset(sketch.flags + 8, VMM_TELL_WRITE | VMM_TELL_READ, 8);
    bank(8, 8, 0, 4, 2);
    placed();
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        quiet_write(bus, MMIO, 0, 4, rows[i]);
        CHECK_EQ(bus_read(bus, MMIO, 8, 8), 0);
        quiet_write(bus, MMIO, 8, 8, UINT64_MAX);
        CHECK_EQ(vmm_window_load(window, rows[i], 8, &(uint64_t){0}, 8), -ERANGE);
        CHECK_EQ(vmm_window_store(window, rows[i], 8, &(uint64_t){0}, 8), -ERANGE);
    }
    CHECK_EQ(stored(0, 8, 8), 0x3333333333333333);
    CHECK_EQ(stored(1, 8, 8), 0x3333333333333333);
    quiet_write(bus, MMIO, 0, 4, 1);
    CHECK_EQ(bus_write(bus, MMIO, 8, 1, 0, &told), 1);
    CHECK_EQ(told.row, 1);
    end();
}

/* The row that is told is the one that the told byte was written to. */
static void an_access_may_begin_before_its_bank(void)
{
    struct vmm_access told;

    begin();
    memset(sketch.writable, 0xff, SIZE);
    sketch.flags[10] = VMM_TELL_WRITE;
    bank(8, 4, 6, 2, 4);
    placed();
    quiet_write(bus, MMIO, 6, 2, 2);
    CHECK_EQ(bus_write(bus, MMIO, 8, 3, 0x010203, &told), 1);
    CHECK_EQ(told.row, 2);
    /* Selector and bank in one. */
    CHECK_EQ(bus_write(bus, MMIO, 4, 8, 0x0a0b0c0d00030000, &told), 1);
    CHECK_EQ(told.row, 3);
    CHECK_EQ(told.offset, 4);
    CHECK_EQ(stored(3, 8, 4), 0x0a0b0c0d);
    CHECK_EQ(stored(2, 8, 4), 0x010203);
    end();
}

/* As virtio-pci has it: the selector that ends an access does not change the row of its start. */
static void an_access_may_end_in_its_selector(void)
{
    struct vmm_access told;

    begin();
    memset(sketch.writable, 0xff, SIZE);
    sketch.flags[4] = VMM_TELL_WRITE;
    bank(4, 4, 8, 1, 4);
    placed();
    quiet_write(bus, MMIO, 8, 1, 1);
    CHECK_EQ(bus_write(bus, MMIO, 4, 5, 0x0311223344, &told), 1);
    CHECK_EQ(told.row, 1);
    CHECK_EQ(stored(1, 4, 4), 0x11223344);
    CHECK_EQ(bus_read(bus, MMIO, 8, 1), 3);
    end();
}

static void stores_and_loads_stay_inside(void)
{
    uint8_t data[SIZE + 1] = {0};

    begin();
    bank(8, 8, 0, 4, 2);
    placed();
    CHECK_EQ(vmm_window_load(window, 0, 0, data, SIZE), 0);
    CHECK_EQ(vmm_window_load(window, 0, 0, data, SIZE + 1), -ERANGE);
    CHECK_EQ(vmm_window_load(window, 0, SIZE, data, 0), 0);
    CHECK_EQ(vmm_window_load(window, 0, SIZE, data, 1), -ERANGE);
    CHECK_EQ(vmm_window_load(window, 0, UINT32_MAX, data, 2), -ERANGE);
    CHECK_EQ(vmm_window_store(window, 0, 1, data, UINT32_MAX), -ERANGE);
    CHECK_EQ(vmm_window_store(window, 1, 0, data, 1), -ERANGE);
    CHECK_EQ(vmm_window_store(window, 1, 15, data, 2), -ERANGE);
    CHECK_EQ(vmm_window_set_bits(window, 31, data, 2), -ERANGE);
    end();
}

static void refused(void)
{
    struct vmm_window *none;

    CHECK_EQ(vmm_window_new(&sketch.config, &none), -EINVAL);
    sketch_init(&sketch, 1, SIZE);
}

static void impossible_windows_are_refused(void)
{
    begin();
    sketch_init(&sketch, 1, 0);
    refused();
    sketch.config.size = VMM_WINDOW_MAX + 1;
    refused();
    sketch.config.num_banks = VMM_WINDOW_BANKS + 1;
    refused();
    bank(8, 0, 0, 4, 1);
    refused();
    bank(8, 8, 0, 4, 0);
    refused();
    bank(8, 8, 0, 0, 1);
    refused();
    bank(8, 8, 0, 5, 1);
    refused();
    bank(25, 8, 0, 4, 1);
    refused();
    bank(UINT32_MAX, 8, 0, 4, 1);
    refused();
    bank(8, UINT32_MAX, 0, 4, 1);
    refused();
    bank(8, 8, 29, 4, 1);
    refused();
    bank(8, 8, UINT32_MAX, 4, 1);
    refused();
    bank(8, 8, 5, 4, 1); /* its selector is in itself */
    refused();
    bank(8, 8, 0, 4, 1);
    bank(15, 2, 0, 4, 1);
    refused();
    bank(8, 8, 0, 4, 1);
    bank(16, 2, 10, 4, 1); /* its selector is in the other */
    refused();
    bank(8, 8, 0, 4, 1);
    bank(16, UINT32_MAX - 8, 0, 4, 1);
    refused();
    bank(8, 8, 0, 4, 1);
    bank(16, 8, 0, 4, 9);
    placed();
    end();
}

static const struct test tests[] = {
    TEST(only_writable_bits_change),
    TEST(told_writes_say_what_was_written),
    TEST(told_changes_are_of_stored_bits),
    TEST(told_reads_hold_what_is_stored),
    TEST(ones_clear),
    TEST(one_register_acknowledges_another),
    TEST(nothing_lies_before_the_first_register),
    TEST(rows_are_selected),
    TEST(beyond_the_last_row_is_nothing),
    TEST(an_access_may_begin_before_its_bank),
    TEST(an_access_may_end_in_its_selector),
    TEST(stores_and_loads_stay_inside),
    TEST(impossible_windows_are_refused),
};

MAIN(tests)
