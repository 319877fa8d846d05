/* The 8250 as its driver sees it (PC16550D), and as the control thread does. */
#include "window.h"
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { PORT = 0x3f8, DATA = 0, IER, IIR, LCR, MCR, LSR, MSR, SCR };

static struct vmm_bus *bus;
static struct vmm_serial *serial;
static int out[2], irq, room;

static void begin(void)
{
    bus = new_bus();
    CHECK_EQ(pipe2(out, O_NONBLOCK), 0);
    irq = eventfd(0, EFD_NONBLOCK);
    room = eventfd(0, EFD_NONBLOCK);
    CHECK_EQ(vmm_serial_new(out[1], irq, room, &serial), 0);
    CHECK_EQ(vmm_bus_place(bus, vmm_serial_window(serial), VMM_SPACE_PIO, PORT), 0);
}

static void end(void)
{
    vmm_bus_remove(bus, vmm_serial_window(serial));
    vmm_serial_free(serial);
    vmm_bus_free(bus);
    close(out[0]);
    close(out[1]);
    close(irq);
    close(room);
}

static uint8_t in(uint32_t at)
{
    return (uint8_t)bus_read(bus, VMM_SPACE_PIO, PORT + at, 1);
}

static void outb(uint32_t at, uint8_t value)
{
    quiet_write(bus, VMM_SPACE_PIO, PORT + at, 1, value);
}

/* The count of an eventfd since it was last asked for. */
static uint64_t edges(int fd)
{
    eventfd_t count = 0;

    return eventfd_read(fd, &count) == 0 ? count : 0;
}

static uint32_t give(const char *text, uint32_t size)
{
    return vmm_serial_receive(serial, (const uint8_t *)text, size);
}

static void as_after_power_on(void)
{
    begin();
    CHECK_EQ(in(IER), 0);
    CHECK_EQ(in(IIR), 0x01);
    CHECK_EQ(in(LCR), 3);
    CHECK_EQ(in(MCR), 0);
    CHECK_EQ(in(LSR), 0x60);
    CHECK_EQ(in(MSR), 0xb0);
    CHECK_EQ(in(DATA), 0);
    CHECK_EQ(edges(irq), 0);
    outb(SCR, 0x5a);
    CHECK_EQ(in(SCR), 0x5a);
    /* Status is not written. */
    outb(LSR, 0xff);
    outb(MSR, 0xff);
    CHECK_EQ(in(LSR), 0x60);
    CHECK_EQ(in(MSR), 0xb0);
    end();
}

static void unused_bits_read_as_zero(void)
{
    begin();
    outb(IER, 0xff);
    CHECK_EQ(in(IER), 0x0f);
    outb(MCR, 0xff);
    CHECK_EQ(in(MCR), 0x1f);
    end();
}

static void the_divisor_hides_data_and_interrupts(void)
{
    begin();
    outb(IER, 1);
    outb(LCR, 0x83);
    CHECK_EQ(in(DATA), 1);
    CHECK_EQ(in(IER), 0);
    outb(DATA, 0x34);
    outb(IER, 0x12);
    CHECK_EQ(in(DATA), 0x34);
    CHECK_EQ(in(IER), 0x12);
    CHECK_EQ(give("x", 1), 1);
    CHECK_EQ(in(DATA), 0x34);
    outb(LCR, 0x03);
    CHECK_EQ(in(IER), 1);
    CHECK_EQ(in(DATA), 'x');
    struct vmm_serial_stats stats;
    vmm_serial_read_stats(serial, &stats);
    CHECK_EQ(stats.sent, 0);
    end();
}

static void what_is_sent_comes_out(void)
{
    char text[8];

    begin();
    for (const char *c = "hello"; *c; c++)
        outb(DATA, (uint8_t)*c);
    CHECK_EQ(read(out[0], text, sizeof(text)), 5);
    CHECK_EQ(memcmp(text, "hello", 5), 0);
    CHECK_EQ(edges(irq), 0);
    end();
}

static void bytes_without_room_are_counted(void)
{
    enum { MANY = 70000 };
    struct vmm_serial_stats stats;
    uint64_t kept = 0;
    char text[4096];

    begin();
    for (int i = 0; i < MANY; i++)
        outb(DATA, 'x');
    for (ssize_t got = read(out[0], text, sizeof(text)); got > 0;
         got = read(out[0], text, sizeof(text)))
        kept += (uint64_t)got;
    vmm_serial_read_stats(serial, &stats);
    CHECK_EQ(stats.sent, MANY);
    CHECK(stats.dropped > 0);
    CHECK_EQ(stats.dropped, MANY - kept);
    end();
}

static void the_empty_transmitter_interrupts(void)
{
    begin();
    outb(IER, 2);
    CHECK_EQ(edges(irq), 1);
    CHECK_EQ(in(IIR), 0x02);
    CHECK_EQ(in(IIR), 0x01); /* reading it acknowledged */
    outb(DATA, 'x');
    CHECK_EQ(edges(irq), 1);
    CHECK_EQ(in(IIR), 0x02);
    outb(IER, 0);
    outb(DATA, 'x');
    CHECK_EQ(edges(irq), 0);
    CHECK_EQ(in(IIR), 0x01);
    outb(IER, 2);
    CHECK_EQ(edges(irq), 1);
    end();
}

static void received_bytes_interrupt(void)
{
    begin();
    CHECK_EQ(give("ab", 2), 2);
    CHECK_EQ(edges(irq), 0);
    CHECK_EQ(in(LSR), 0x61);
    CHECK_EQ(in(IIR), 0x01);
    outb(IER, 1);
    CHECK_EQ(edges(irq), 1);
    CHECK_EQ(in(IIR), 0x04);
    CHECK_EQ(in(IIR), 0x04); /* until it is read */
    CHECK_EQ(in(DATA), 'a');
    CHECK_EQ(edges(irq), 1); /* an edge again, for what is left */
    CHECK_EQ(in(DATA), 'b');
    CHECK_EQ(edges(irq), 0);
    CHECK_EQ(in(IIR), 0x01);
    CHECK_EQ(in(LSR), 0x60);
    end();
}

static void received_comes_before_sent(void)
{
    begin();
    outb(IIR, 0x01);
    outb(IER, 3);
    CHECK_EQ(give("a", 1), 1);
    CHECK_EQ(in(IIR), 0xc4);
    CHECK_EQ(in(DATA), 'a');
    CHECK_EQ(in(IIR), 0xc2);
    CHECK_EQ(in(IIR), 0xc1);
    outb(IIR, 0);
    CHECK_EQ(in(IIR), 0x01);
    end();
}

static void loopback_hears_itself(void)
{
    char text[4];

    begin();
    outb(MCR, 0x10);
    CHECK_EQ(in(MSR), 0);
    static const uint8_t lines[][2] = {{0x11, 0x20}, {0x12, 0x10}, {0x14, 0x40}, {0x18, 0x80}};
    for (size_t i = 0; i < 4; i++) {
        outb(MCR, lines[i][0]);
        CHECK_EQ(in(MSR), lines[i][1]);
    }
    outb(DATA, 'x');
    CHECK_EQ(in(LSR), 0x61);
    CHECK_EQ(give("y", 1), 0);
    CHECK_EQ(edges(room), 0);
    CHECK_EQ(in(DATA), 'x');
    CHECK_EQ(in(LSR), 0x60);
    CHECK_EQ(edges(room), 0);
    CHECK_EQ(read(out[0], text, 4), -1);
    outb(MCR, 0);
    CHECK_EQ(edges(room), 1);
    CHECK_EQ(give("y", 1), 1);
    CHECK_EQ(in(DATA), 'y');
    end();
}

static void loopback_cannot_overflow(void)
{
    begin();
    outb(MCR, 0x10);
    for (int i = 0; i < 10 * VMM_SERIAL_FIFO; i++)
        outb(DATA, (uint8_t)i);
    for (int i = 0; i < VMM_SERIAL_FIFO; i++)
        CHECK_EQ(in(DATA), i);
    CHECK_EQ(in(LSR), 0x60);
    end();
}

static void fill_fifo(void)
{
    char text[VMM_SERIAL_FIFO + 10];

    memset(text, 'x', sizeof(text));
    CHECK_EQ(give(text, sizeof(text)), VMM_SERIAL_FIFO);
    CHECK_EQ(give(text, 1), 0);
    CHECK_EQ(edges(room), 0);
}

static void room_is_told_when_all_is_read(void)
{
    begin();
    fill_fifo();
    for (int i = 0; i < VMM_SERIAL_FIFO - 1; i++)
        CHECK_EQ(in(DATA), 'x');
    CHECK_EQ(edges(room), 0);
    CHECK_EQ(in(DATA), 'x');
    CHECK_EQ(edges(room), 1);
    CHECK_EQ(give("abc", 3), 3);
    for (int i = 0; i < 4; i++)
        in(DATA);
    CHECK_EQ(edges(room), 0); /* nobody waited */
    end();
}

static void room_is_told_when_all_is_thrown_away(void)
{
    begin();
    fill_fifo();
    outb(IIR, 0x03);
    CHECK_EQ(edges(room), 1);
    CHECK_EQ(in(LSR), 0x60);
    fill_fifo();
    vmm_serial_reset(serial);
    CHECK_EQ(edges(room), 1);
    CHECK_EQ(give("a", 1), 1);
    CHECK_EQ(in(DATA), 'a');
    end();
}

static void wide_accesses_are_bytes(void)
{
    struct vmm_access told;
    uint64_t value = 0;

    begin();
    quiet_write(bus, VMM_SPACE_PIO, PORT, 8, 0x7700000003000061);
    CHECK_EQ(in(SCR), 0x77);
    CHECK_EQ(vmm_bus_access(bus, VMM_SPACE_PIO, PORT + 1, (uint8_t *)&value, 8, false, &told), 0);
    CHECK(value == UINT64_MAX);
    CHECK_EQ(bus_read(bus, VMM_SPACE_PIO, PORT, 8) >> 56, 0x77);
    CHECK_EQ(read(out[0], &value, 8), 1);
    end();
}

static void state_goes_round(void)
{
    struct vmm_serial_state state;

    begin();
    outb(IER, 1);
    outb(SCR, 0x42);
    outb(IIR, 1);
    CHECK_EQ(give("state", 5), 5);
    CHECK_EQ(in(DATA), 's');
    vmm_serial_save(serial, &state);
    vmm_serial_reset(serial);
    CHECK_EQ(in(SCR), 0);
    CHECK_EQ(in(LSR), 0x60);
    edges(irq);
    CHECK_EQ(vmm_serial_load(serial, &state), 0);
    CHECK_EQ(edges(irq), 1);
    CHECK_EQ(in(SCR), 0x42);
    CHECK_EQ(in(IIR), 0xc4);
    for (const char *c = "tate"; *c; c++)
        CHECK_EQ(in(DATA), *c);
    CHECK_EQ(in(LSR), 0x60);
    end();
}

static void impossible_states_are_refused(void)
{
    struct vmm_serial_state good, bad;

    begin();
    vmm_serial_save(serial, &good);
    bad = good;
    bad.head = VMM_SERIAL_FIFO;
    CHECK_EQ(vmm_serial_load(serial, &bad), -EINVAL);
    bad = good;
    bad.count = VMM_SERIAL_FIFO + 1;
    CHECK_EQ(vmm_serial_load(serial, &bad), -EINVAL);
    bad = good;
    bad.ier = 0x10;
    CHECK_EQ(vmm_serial_load(serial, &bad), -EINVAL);
    bad = good;
    bad.mcr = 0x20;
    CHECK_EQ(vmm_serial_load(serial, &bad), -EINVAL);
    bad = good;
    bad.fcr = 0x02;
    CHECK_EQ(vmm_serial_load(serial, &bad), -EINVAL);
    bad = good;
    bad.sent = 2;
    CHECK_EQ(vmm_serial_load(serial, &bad), -EINVAL);
    good.head = VMM_SERIAL_FIFO - 1;
    good.count = VMM_SERIAL_FIFO;
    CHECK_EQ(vmm_serial_load(serial, &good), 0);
    for (int i = 0; i < 2 * VMM_SERIAL_FIFO; i++)
        in(DATA);
    CHECK_EQ(in(LSR), 0x60);
    end();
}

enum { STREAM = 20000 };

static atomic_bool all_read;

/* As a driver: reads while data is ready, and now and then touches the rest. */
static void *read_stream(void *arg)
{
    uint32_t *got = arg;

    while (*got < STREAM) {
        if (in(LSR) & 1) {
            CHECK_EQ(in(DATA), *got & 0x7f);
            (*got)++;
        }
        in(IIR);
        outb(SCR, (uint8_t)*got);
    }
    atomic_store(&all_read, true);
    return NULL;
}

static void *write_stream(void *arg)
{
    (void)arg;
    while (!atomic_load(&all_read))
        outb(DATA, 'o');
    return NULL;
}

static void streams_pass_each_other(void)
{
    pthread_t reader, writer;
    uint32_t got = 0, given = 0;
    char drained[4096];

    begin();
    outb(IER, 3);
    CHECK_EQ(pthread_create(&reader, NULL, read_stream, &got), 0);
    CHECK_EQ(pthread_create(&writer, NULL, write_stream, NULL), 0);
    while (given < STREAM) {
        uint8_t chunk[100];
        uint32_t size = STREAM - given < 100 ? STREAM - given : 100;
        for (uint32_t i = 0; i < size; i++)
            chunk[i] = (given + i) & 0x7f;
        uint32_t taken = vmm_serial_receive(serial, chunk, size);
        given += taken;
        if (taken < size) {
            struct pollfd wait = {.fd = room, .events = POLLIN};
            CHECK_EQ(poll(&wait, 1, -1), 1);
            CHECK_EQ(edges(room), 1);
        }
        while (read(out[0], drained, sizeof(drained)) > 0)
            ;
    }
    CHECK_EQ(pthread_join(reader, NULL), 0);
    CHECK_EQ(pthread_join(writer, NULL), 0);
    CHECK_EQ(got, STREAM);
    end();
}

static const struct test tests[] = {
    TEST(as_after_power_on),
    TEST(unused_bits_read_as_zero),
    TEST(the_divisor_hides_data_and_interrupts),
    TEST(what_is_sent_comes_out),
    TEST(bytes_without_room_are_counted),
    TEST(the_empty_transmitter_interrupts),
    TEST(received_bytes_interrupt),
    TEST(received_comes_before_sent),
    TEST(loopback_hears_itself),
    TEST(loopback_cannot_overflow),
    TEST(room_is_told_when_all_is_read),
    TEST(room_is_told_when_all_is_thrown_away),
    TEST(wide_accesses_are_bytes),
    TEST(state_goes_round),
    TEST(impossible_states_are_refused),
    TEST(streams_pass_each_other),
};

MAIN(tests)
