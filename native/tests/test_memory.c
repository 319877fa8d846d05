/* Guest memory: regions, tables, translation, and files that shrink under us. */
#include "driver_ring.h"
#include "internal.h"
#include <signal.h>
#include <sys/wait.h>

enum { PAGE = 4096 };

static int file_of(uint64_t size)
{
    int fd = memfd_create("region", MFD_CLOEXEC);

    CHECK(fd >= 0);
    CHECK_EQ(ftruncate(fd, (off_t)size), 0);
    return fd;
}

static struct vhost_region *region_of(int fd, uint64_t offset, uint64_t addr, uint64_t size)
{
    struct vhost_region *r;

    CHECK_EQ(vhost_region_map(fd, offset, addr, size, &r), 0);
    return r;
}

static void a_region_shares_its_file(void)
{
    int fd = file_of(4 * PAGE);
    struct vhost_region *r = region_of(fd, PAGE, 0x10000, 2 * PAGE);
    struct vhost_memory *m;
    char byte;

    CHECK_EQ(vhost_memory_new(&r, 1, &m), 0);
    vhost_region_unref(r);
    char *host = vhost_memory_translate(m, 0x10000, 2 * PAGE);
    CHECK(host != NULL);
    host[5] = 'x';
    CHECK_EQ(pread(fd, &byte, 1, PAGE + 5), 1);
    CHECK_EQ(byte, 'x');
    vhost_memory_unref(m);
    close(fd);
}

static void an_offset_need_not_be_a_page(void)
{
    int fd = file_of(4 * PAGE);
    struct vhost_region *r = region_of(fd, PAGE + 512, 0x10200, PAGE);
    struct vhost_memory *m;

    CHECK_EQ(pwrite(fd, "here", 4, PAGE + 512), 4);
    CHECK_EQ(vhost_memory_new(&r, 1, &m), 0);
    vhost_region_unref(r);
    CHECK(memcmp(vhost_memory_translate(m, 0x10200, 4), "here", 4) == 0);
    vhost_memory_unref(m);
    close(fd);
}

static void translation_takes_whole_ranges_only(void)
{
    int fd = file_of(4 * PAGE);
    struct vhost_region *r = region_of(fd, 0, 0x10000, 4 * PAGE);
    struct vhost_memory *m;

    CHECK_EQ(vhost_memory_new(&r, 1, &m), 0);
    vhost_region_unref(r);
    char *base = vhost_memory_translate(m, 0x10000, 1);
    CHECK(vhost_memory_translate(m, 0x13fff, 1) == base + 4 * PAGE - 1);
    CHECK(vhost_memory_translate(m, 0x10000, 4 * PAGE) == base);
    CHECK(!vhost_memory_translate(m, 0x13fff, 2));
    CHECK(!vhost_memory_translate(m, 0x14000, 1));
    CHECK(!vhost_memory_translate(m, 0xffff, 1));
    CHECK(!vhost_memory_translate(m, 0, 1));
    CHECK(!vhost_memory_translate(m, 0x10001, UINT64_MAX));
    CHECK(!vhost_memory_translate(m, UINT64_MAX, 2));
    vhost_memory_unref(m);
    close(fd);
}

static void adjacent_regions_are_found_and_not_joined(void)
{
    int fd = file_of(4 * PAGE);
    struct vhost_region *r[3] = {
        region_of(fd, 3 * PAGE, 0x30000, PAGE),
        region_of(fd, 0, 0x10000, PAGE),
        region_of(fd, PAGE, 0x11000, 2 * PAGE),
    };
    struct vhost_memory *m;
    uint32_t hint = 0;

    CHECK_EQ(vhost_memory_new(r, 3, &m), 0);
    for (int i = 0; i < 3; i++)
        vhost_region_unref(r[i]);
    CHECK(vhost_memory_translate(m, 0x10fff, 1));
    CHECK(vhost_memory_translate(m, 0x11000, 2 * PAGE));
    CHECK(vhost_memory_translate(m, 0x30000, PAGE));
    CHECK(!vhost_memory_translate(m, 0x10fff, 2));
    CHECK(!vhost_memory_translate(m, 0x13000, 1));
    CHECK_EQ(memory_find(m, 0x30000, &hint)->guest_addr, 0x30000);
    CHECK_EQ(memory_find(m, 0x10fff, &hint)->guest_addr, 0x10000);
    CHECK_EQ(memory_find(m, 0x11000, &hint)->guest_addr, 0x11000);
    CHECK(!memory_find(m, 0x13000, &hint));
    vhost_memory_unref(m);
    close(fd);
}

static void many_regions_are_all_found(void)
{
    enum { N = VHOST_USER_MEM_SLOTS };
    int fd = file_of((uint64_t)N * PAGE);
    struct vhost_region *r[N];
    struct vhost_memory *m;
    uint32_t hint = 0, log_hint = 0;

    for (uint32_t i = 0; i < N; i++) {
        uint32_t slot = i * 37 % N;  /* not in order */
        uint32_t page = i * 101 % N; /* nor mapped in the order of guest addresses */
        r[i] = region_of(fd, (uint64_t)page * PAGE, (uint64_t)slot * 2 * PAGE, PAGE);
    }
    CHECK_EQ(vhost_memory_new(r, N, &m), 0);
    for (uint32_t i = 0; i < N; i++) {
        uint64_t addr = (uint64_t)i * 2 * PAGE;
        vhost_region_unref(r[i]);
        CHECK_EQ(memory_find(m, addr + 1, &hint)->guest_addr, addr);
        CHECK(!memory_find(m, addr + PAGE, &hint));
        CHECK_EQ(memory_guest_addr(m, vhost_memory_translate(m, addr, 1), &log_hint), addr);
        char *last = vhost_memory_translate(m, addr + PAGE - 1, 1);
        log_hint = i & 1 ? log_hint : UINT32_MAX; /* of another table, which was longer */
        CHECK_EQ(memory_guest_addr(m, last, &log_hint), addr + PAGE - 1);
    }
    vhost_memory_unref(m);
    close(fd);
}

static void overlapping_regions_are_refused(void)
{
    int fd = file_of(4 * PAGE);
    struct vhost_region *r[2] = {region_of(fd, 0, 0x10000, 2 * PAGE),
                                 region_of(fd, 0, 0x11000, PAGE)};
    struct vhost_region *twice[2] = {r[0], r[0]};
    struct vhost_memory *m = NULL;

    CHECK_EQ(vhost_memory_new(r, 2, &m), -EEXIST);
    CHECK_EQ(vhost_memory_new(twice, 2, &m), -EEXIST);
    CHECK(m == NULL);
    vhost_region_unref(r[0]);
    vhost_region_unref(r[1]);
    close(fd);
}

static void an_empty_table_translates_nothing(void)
{
    struct vhost_memory *m;

    CHECK_EQ(vhost_memory_new(NULL, 0, &m), 0);
    CHECK(!vhost_memory_translate(m, 0, 1));
    vhost_memory_unref(m);
}

static void sizes_and_offsets_that_wrap_are_refused(void)
{
    int fd = file_of(4 * PAGE);
    struct vhost_region *r = NULL;

    CHECK_EQ(vhost_region_map(fd, 0, 0, 0, &r), -EINVAL);
    CHECK_EQ(vhost_region_map(fd, 0, UINT64_MAX - PAGE + 1, 2 * PAGE, &r), -EINVAL);
    CHECK_EQ(vhost_region_map(fd, 0, UINT64_MAX - PAGE + 1, PAGE, &r), -EINVAL);
    CHECK_EQ(vhost_region_map(fd, UINT64_MAX - PAGE + 1, 0, 2 * PAGE, &r), -EINVAL);
    CHECK_EQ(vhost_region_map(fd, UINT64_C(1) << 63, 0, PAGE, &r), -EINVAL);
    CHECK(r == NULL);
    close(fd);
}

static void a_file_that_is_too_short_is_refused(void)
{
    int fd = file_of(2 * PAGE);
    struct vhost_region *r = NULL;

    CHECK_EQ(vhost_region_map(fd, 0, 0, 2 * PAGE + 1, &r), -ENXIO);
    CHECK_EQ(vhost_region_map(fd, PAGE, 0, 2 * PAGE, &r), -ENXIO);
    CHECK_EQ(vhost_region_map(fd, 2 * PAGE, 0, 1, &r), -ENXIO);
    CHECK(r == NULL);
    close(fd);
}

static void what_is_not_a_file_is_refused(void)
{
    struct vhost_region *r = NULL;
    int ends[2];
    int directory = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    CHECK_EQ(pipe2(ends, O_CLOEXEC), 0);
    CHECK_EQ(vhost_region_map(directory, 0, 0, PAGE, &r), -ENODEV);
    CHECK_EQ(vhost_region_map(null, 0, 0, PAGE, &r), -ENODEV);
    CHECK_EQ(vhost_region_map(ends[0], 0, 0, PAGE, &r), -ENODEV);
    CHECK_EQ(vhost_region_map(-1, 0, 0, PAGE, &r), -EBADF);
    CHECK(r == NULL);
    close(directory);
    close(null);
    close(ends[0]);
    close(ends[1]);
}

static void a_file_that_may_not_be_written_is_refused(void)
{
    char path[] = "/tmp/test_memory.XXXXXX";
    struct vhost_region *r = NULL;
    int writable = mkstemp(path);

    CHECK(writable >= 0);
    CHECK_EQ(ftruncate(writable, PAGE), 0);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    unlink(path);
    CHECK_EQ(vhost_region_map(fd, 0, 0, PAGE, &r), -EACCES);
    CHECK(r == NULL);
    close(fd);
    close(writable);
}

static void a_truncated_file_breaks_its_own_memory_only(void)
{
    int short_fd = file_of(4 * PAGE), whole_fd = file_of(PAGE);
    struct vhost_region *r = region_of(short_fd, 0, 0x10000, 4 * PAGE);
    struct vhost_region *s = region_of(whole_fd, 0, 0x10000, PAGE);
    struct vhost_memory *m, *other;
    unsigned faults = atomic_load(&memory_faults);

    CHECK_EQ(vhost_memory_new(&r, 1, &m), 0);
    CHECK_EQ(vhost_memory_new(&s, 1, &other), 0);
    vhost_region_unref(r);
    vhost_region_unref(s);
    volatile char *broken = vhost_memory_translate(m, 0x10000, 4 * PAGE);
    volatile char *whole = vhost_memory_translate(other, 0x10000, PAGE);
    whole[0] = 'w';
    CHECK_EQ(ftruncate(short_fd, PAGE), 0);
    CHECK_EQ(broken[3 * PAGE], 0);
    broken[2 * PAGE] = 1;
    CHECK(atomic_load(&memory_faults) > faults);
    CHECK(memory_is_broken(m));
    CHECK(!memory_is_broken(other));
    CHECK_EQ(whole[0], 'w');
    vhost_memory_unref(m);
    vhost_memory_unref(other);
    close(short_fd);
    close(whole_fd);
}

/* A SIGBUS outside guest memory is somebody else's, and must stay deadly. */
static void a_sigbus_of_others_still_kills(void)
{
    int fd = file_of(PAGE), status;
    struct vhost_region *r = region_of(fd, 0, 0, PAGE); /* installs the handler */

    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        int own = memfd_create("own", MFD_CLOEXEC);
        volatile char *p = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, own, 0);
        _exit(p[0]);
    }
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFSIGNALED(status) || WEXITSTATUS(status) != 0); /* a sanitizer reports, then exits */
    vhost_region_unref(r);
    close(fd);
}

static void a_region_outlives_its_tables(void)
{
    int fd = file_of(PAGE);
    struct vhost_region *r = region_of(fd, 0, 0x10000, PAGE);
    struct vhost_memory *m, *next;

    CHECK_EQ(vhost_memory_new(&r, 1, &m), 0);
    void *host = vhost_memory_translate(m, 0x10000, 1);
    CHECK_EQ(vhost_memory_new(&r, 1, &next), 0);
    vhost_region_unref(r);
    vhost_memory_unref(m);
    CHECK(vhost_memory_translate(next, 0x10000, 1) == host);
    memset(host, 1, PAGE);
    vhost_memory_unref(next);
    CHECK_EQ(msync(host, PAGE, MS_ASYNC), -1); /* unmapped with the last table */
    CHECK_EQ(errno, ENOMEM);
    close(fd);
}

/* ---- views ---- */

static struct vhost_memory *view(const struct guest *g, const struct vhost_translation *entries,
                                 uint32_t n)
{
    struct vhost_memory *m;

    CHECK_EQ(vhost_memory_view(g->memory, entries, n, &m), 0);
    return m;
}

static int view_error(const struct guest *g, struct vhost_translation a, struct vhost_translation b)
{
    struct vhost_translation entries[] = {a, b};
    struct vhost_memory *m = NULL;
    int err = vhost_memory_view(g->memory, entries, 2, &m);

    CHECK(m == NULL);
    return err;
}

static void what_is_no_view_is_refused(void)
{
    struct guest g = guest_new(GUEST_SIZE, GUEST_SIZE / 2);
    struct vhost_translation good = {0x1000, PAGE, GUEST_BASE, VHOST_ACCESS_READ};
    struct vhost_translation next = {0x2000, PAGE, GUEST_BASE, VHOST_ACCESS_READ};
    struct vhost_memory *m, *nested = NULL;

    struct vhost_translation wrong[] = {
        {0x1fff, PAGE, GUEST_BASE, VHOST_ACCESS_READ},
        {0x2000, 0, GUEST_BASE, VHOST_ACCESS_READ},
        {UINT64_MAX - PAGE + 1, PAGE, GUEST_BASE, VHOST_ACCESS_READ},
        {0x2000, PAGE, GUEST_BASE, 0},
        {0x2000, PAGE, GUEST_BASE, 4},
    };
    uint64_t outside[] = {GUEST_BASE - 1, GUEST_BASE + GUEST_SIZE - PAGE + 1,
                          GUEST_BASE + GUEST_SIZE / 2 - 1};

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++)
        CHECK_EQ(view_error(&g, good, wrong[i]), -EINVAL);
    for (size_t i = 0; i < ARRAY_SIZE(outside); i++) {
        next.guest_addr = outside[i];
        CHECK_EQ(view_error(&g, good, next), -EFAULT);
    }
    next.guest_addr = GUEST_BASE;
    CHECK_EQ(view_error(&g, next, good), -EINVAL);
    m = view(&g, &good, 1);
    CHECK_EQ(vhost_memory_view(m, &good, 1, &nested), -EINVAL);
    CHECK(nested == NULL);
    vhost_memory_unref(m);
    guest_free(&g);
}

static void addresses_are_looked_up(void)
{
    enum { N = 100 };
    struct guest g = guest_new(GUEST_SIZE, 0);
    struct vhost_translation entries[N];
    uint32_t hint = UINT32_MAX; /* of another view */
    uint64_t room;

    for (uint32_t i = 0; i < N; i++)
        entries[i] = (struct vhost_translation){UINT64_C(3) * PAGE * i, PAGE,
                                                GUEST_BASE + PAGE * (N - i), i % 3 + 1};
    struct vhost_memory *m = view(&g, entries, N);
    CHECK(vhost_memory_translate(m, 0, 1) == NULL);
    for (uint32_t n = 0; n < 2 * N; n++) {
        uint32_t i = n * 37 % N;
        uint64_t iova = entries[i].iova + 5;
        for (unsigned access = 1; access <= 3; access++) {
            const char *host = view_find(m, iova, access, &hint, &room);
            if ((entries[i].access & access) != access) {
                CHECK(host == NULL);
                continue;
            }
            CHECK(host == (char *)vhost_memory_translate(g.memory, entries[i].guest_addr, 1) + 5);
            CHECK_EQ(room, PAGE - 5);
        }
        CHECK(view_find(m, entries[i].iova + PAGE, VHOST_ACCESS_READ, &hint, &room) == NULL);
    }
    vhost_memory_unref(m);
    guest_free(&g);
}

static void a_view_keeps_its_memory(void)
{
    struct guest g = guest_new(GUEST_SIZE, 0);
    struct vhost_translation whole = {0, GUEST_SIZE, GUEST_BASE,
                                      VHOST_ACCESS_READ | VHOST_ACCESS_WRITE};
    struct vhost_memory *m = view(&g, &whole, 1);
    uint32_t hint = 0;
    uint64_t room = 0;

    vhost_memory_unref(g.memory);
    char *host = view_find(m, 0, VHOST_ACCESS_WRITE, &hint, &room);
    CHECK_EQ(room, GUEST_SIZE);
    memset(host, 1, GUEST_SIZE);
    CHECK_EQ(memory_guest_addr(m, host + 7, &hint), GUEST_BASE + 7);
    CHECK(!memory_is_broken(m));
    CHECK_EQ(ftruncate(g.fd, 0), 0);
    CHECK_EQ(((volatile char *)host)[PAGE], 0);
    CHECK(memory_is_broken(m));
    g.memory = m;
    guest_free(&g);
}

static const struct test tests[] = {
    TEST(a_region_shares_its_file),
    TEST(an_offset_need_not_be_a_page),
    TEST(translation_takes_whole_ranges_only),
    TEST(adjacent_regions_are_found_and_not_joined),
    TEST(many_regions_are_all_found),
    TEST(overlapping_regions_are_refused),
    TEST(an_empty_table_translates_nothing),
    TEST(sizes_and_offsets_that_wrap_are_refused),
    TEST(a_file_that_is_too_short_is_refused),
    TEST(what_is_not_a_file_is_refused),
    TEST(a_file_that_may_not_be_written_is_refused),
    TEST(a_truncated_file_breaks_its_own_memory_only),
    TEST(a_sigbus_of_others_still_kills),
    TEST(a_region_outlives_its_tables),
    TEST(what_is_no_view_is_refused),
    TEST(addresses_are_looked_up),
    TEST(a_view_keeps_its_memory),
};
MAIN(tests)
