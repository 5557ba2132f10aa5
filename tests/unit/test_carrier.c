/*
 * test_carrier.c: ucx/carrier.h on a device whose streams run by themselves, each on a thread of its own, late and at
 * their own pace: what is received is right, whatever comes first; a stream goes on when its bytes are there, when the
 * communicator is aborted, and for no other reason.
 *
 * Ranks are carriers of this process, each with a hub of its own, so that UCX goes over its network. Seeds are printed.
 */
#include <check.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "run/run.h"
#include "ucx/carrier.h"

/* ---- the device ---- */

struct op {
    struct op *next;
    enum { COPY, WRITE, WAIT } kind;
    void *to;
    const void *from;
    size_t bytes;
    uint32_t value;
};

struct stream {
    pthread_mutex_t lock;
    pthread_t thread;
    struct op *first, **last;
    _Atomic long pending;
    _Atomic bool ends;
    unsigned seed;
};

static bool no_words;

static void pause_us(long us)
{
    nanosleep(&(struct timespec){.tv_nsec = us * 1000}, NULL);
}

static void *run_stream(void *arg)
{
    struct stream *s = arg;
    while (!atomic_load(&s->ends)) {
        pthread_mutex_lock(&s->lock);
        struct op *o = s->first;
        pthread_mutex_unlock(&s->lock);
        if (!o || (o->kind == WAIT &&
                   (int32_t)(__atomic_load_n((const uint32_t *)o->from, __ATOMIC_ACQUIRE) - o->value) < 0)) {
            pause_us(20);
            continue;
        }
        if (rand_r(&s->seed) % 16 == 0)
            pause_us(rand_r(&s->seed) % 300);
        if (o->kind == COPY)
            memcpy(o->to, o->from, o->bytes);
        else if (o->kind == WRITE)
            __atomic_store_n((uint32_t *)o->to, o->value, __ATOMIC_RELEASE);
        pthread_mutex_lock(&s->lock);
        if (!(s->first = o->next))
            s->last = &s->first;
        pthread_mutex_unlock(&s->lock);
        free(o);
        atomic_fetch_sub(&s->pending, 1);
    }
    return NULL;
}

static int push(void *stream, struct op o)
{
    struct stream *s = stream;
    struct op *p = malloc(sizeof *p);
    *p = o;
    p->next = NULL;
    atomic_fetch_add(&s->pending, 1);
    pthread_mutex_lock(&s->lock);
    *s->last = p;
    s->last = &p->next;
    pthread_mutex_unlock(&s->lock);
    return 0;
}

static int d_copy(void *to, const void *from, size_t bytes, void *stream, struct ry_err *err)
{
    return push(stream, (struct op){.kind = COPY, .to = to, .from = from, .bytes = bytes});
}

static int d_write(void *stream, uint32_t *word, uint32_t value, struct ry_err *err)
{
    return push(stream, (struct op){.kind = WRITE, .to = word, .value = value});
}

static int d_wait(void *stream, const uint32_t *word, uint32_t value, struct ry_err *err)
{
    return no_words ? ry_fail(err, "no such thing here")
                    : push(stream, (struct op){.kind = WAIT, .from = word, .value = value});
}

static int d_stream_create(void **stream, struct ry_err *err)
{
    static unsigned seeds;
    struct stream *s = calloc(1, sizeof *s);
    pthread_mutex_init(&s->lock, NULL);
    s->last = &s->first;
    s->seed = ++seeds * 7919;
    pthread_create(&s->thread, NULL, run_stream, s);
    *stream = s;
    return 0;
}

/* Whatever is still on it will never be done. */
static int d_stream_destroy(void *stream, struct ry_err *err)
{
    struct stream *s = stream;
    atomic_store(&s->ends, true);
    pthread_join(s->thread, NULL);
    for (struct op *o; (o = s->first);) {
        s->first = o->next;
        free(o);
    }
    pthread_mutex_destroy(&s->lock);
    free(s);
    return 0;
}

static bool is_through(struct stream *s, double seconds)
{
    uint64_t until = ry_now_ns() + (uint64_t)(seconds * 1e9);
    while (atomic_load(&s->pending) && ry_now_ns() < until)
        pause_us(200);
    return !atomic_load(&s->pending);
}

static int d_pinned(void **out, size_t bytes, struct ry_err *err)
{
    return (*out = malloc(bytes)) ? 0 : ry_fail(err, "no memory");
}

static int d_unpin(void *p, struct ry_err *err)
{
    free(p);
    return 0;
}

static int d_use(int ordinal, struct ry_err *err)
{
    return 0;
}

static void d_relax(void)
{
}

static const struct ry_device device = {.name = "test",
                                        .copy = d_copy,
                                        .stream_write_value = d_write,
                                        .stream_wait_value = d_wait,
                                        .stream_create = d_stream_create,
                                        .stream_destroy = d_stream_destroy,
                                        .pinned_alloc = d_pinned,
                                        .pinned_free = d_unpin,
                                        .use = d_use,
                                        .relax_thread = d_relax};

/* ---- ranks ---- */

enum { MOST = 4 };
static struct ry_hub *hubs[MOST];
static struct world {
    int n;
    struct rank {
        struct ry_carrier *carrier;
        void *stream;
        _Atomic int failed, hopeless, peer;
        char why[200];
    } rank[MOST];
} world;

static void failed(void *context, uint64_t number, int peer, const char *why)
{
    struct rank *r = context;
    atomic_store(&r->peer, peer);
    snprintf(r->why, sizeof r->why, "%s", why);
    atomic_store(&r->failed, (int)number);
}

static void hopeless(void *context, uint64_t number)
{
    struct rank *r = context;
    atomic_store(&r->hopeless, (int)number);
}

static void wait_for_state(int rank, enum ry_cross_state state)
{
    for (int i = 0; i < 50000 && ry_carrier_state(world.rank[rank].carrier) != state; i++)
        pause_us(200);
    ck_assert_int_eq(ry_carrier_state(world.rank[rank].carrier), state);
}

static void make(int n, double patience)
{
    struct ry_err err;
    memset(&world, 0, sizeof world);
    world.n = n;
    ry_run_staging_limit(UINT64_C(2) << 30);
    for (int r = 0; r < n; r++) {
        bool with[MOST];
        for (int p = 0; p < n; p++)
            with[p] = p != r;
        if (!hubs[r])
            hubs[r] = ry_hub_start(&device, 0, false, &err);
        ck_assert_msg(hubs[r], "%s", err.msg);
        struct ry_carrier_config config = {.hub = hubs[r],
                                           .device = &device,
                                           .nranks = n,
                                           .rank = r,
                                           .with = with,
                                           .patience = patience,
                                           .name = "test",
                                           .failed = failed,
                                           .hopeless = hopeless,
                                           .context = &world.rank[r]};
        world.rank[r].carrier = ry_carrier_new(&config, &err);
        ck_assert_msg(world.rank[r].carrier, "%s", err.msg);
        d_stream_create(&world.rank[r].stream, NULL);
    }
}

static void introduce(int r, int p)
{
    struct ry_err err;
    size_t size;
    const void *card = ry_carrier_card(world.rank[p].carrier, &size);
    ck_assert_msg(!ry_carrier_meet(world.rank[r].carrier, p, card, size, &err), "%s", err.msg);
}

static void meet(uint64_t bytes)
{
    for (int r = 0; r < world.n; r++)
        for (int p = 0; p < world.n; p++)
            if (p != r)
                introduce(r, p);
    for (int r = 0; r < world.n; r++) {
        wait_for_state(r, RY_CROSS_HAS);
        ry_carrier_want(world.rank[r].carrier, bytes);
        for (int i = 0; i < 50000 && ry_carrier_held(world.rank[r].carrier) < bytes; i++)
            pause_us(200);
        ck_assert_uint_ge(ry_carrier_held(world.rank[r].carrier), bytes);
    }
}

static void over(void)
{
    for (int r = 0; r < world.n; r++) {
        d_stream_destroy(world.rank[r].stream, NULL);
        ry_carrier_end(world.rank[r].carrier, false);
    }
}

/* ---- transfers ---- */

struct message {
    int from, to;
    uint64_t bytes;
    unsigned char *out, *in;
};

static unsigned char byte_of(unsigned seed, uint64_t i)
{
    uint64_t x = (i + seed) * 0x9e3779b97f4a7c15ull;
    return (unsigned char)(x >> 56);
}

static int begin(int rank, const struct message *m, int n, struct ry_err *err)
{
    struct ry_cross_transfer list[256];
    struct ry_cross *face = ry_carrier_face(world.rank[rank].carrier);
    int count = 0;
    for (int i = 0; i < n; i++) {
        if (m[i].from == rank)
            list[count++] = (struct ry_cross_transfer){true, m[i].to, m[i].out, m[i].bytes};
        if (m[i].to == rank)
            list[count++] = (struct ry_cross_transfer){false, m[i].from, m[i].in, m[i].bytes};
    }
    return !count ? 0
                  : face->begin(face, list, count, world.rank[rank].stream, err) ||
                        face->end(face, world.rank[rank].stream, err);
}

static struct message message(int from, int to, uint64_t bytes, unsigned seed)
{
    struct message m = {from, to, bytes, malloc(bytes), malloc(bytes)};
    for (uint64_t i = 0; i < bytes; i++)
        m.out[i] = byte_of(seed, i);
    memset(m.in, 0xEE, bytes);
    return m;
}

static void check_and_free(struct message *m, int n)
{
    for (int i = 0; i < n; i++) {
        ck_assert_msg(!memcmp(m[i].out, m[i].in, m[i].bytes),
                      "message %d, of %llu bytes from %d to %d, is not what was sent", i,
                      (unsigned long long)m[i].bytes, m[i].from, m[i].to);
        free(m[i].out);
        free(m[i].in);
    }
}

/* Groups of any messages, several between the same two as well, one group after the other; the host runs ahead of all
 * streams. */
START_TEST(test_random)
{
    unsigned seed = (unsigned)(getenv("RY_TEST_SEED") ? atoi(getenv("RY_TEST_SEED")) : (int)time(NULL)) + (unsigned)_i;
    struct ry_err err;
    printf("seed %u\n", seed);
    make(2 + _i % 3, 30);
    meet(UINT64_C(64) << 20);
    enum { GROUPS = 8 };
    struct message m[GROUPS][16];
    int count[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        count[g] = (int)(rand_r(&seed) % 16);
        for (int i = 0; i < count[g]; i++) {
            int from = (int)(rand_r(&seed) % (unsigned)world.n),
                to = (from + 1 + (int)(rand_r(&seed) % (unsigned)(world.n - 1))) % world.n;
            static const uint64_t most[] = {10, 5000, 300000, 3u << 20};
            m[g][i] = message(from, to, 1 + rand_r(&seed) % most[rand_r(&seed) % (g % 3 ? 3 : 4)], seed);
        }
    }
    for (int g = 0; g < GROUPS; g++)
        for (int r = 0; r < world.n; r++)
            ck_assert_msg(!begin(r, m[g], count[g], &err), "%s", err.msg);
    for (int r = 0; r < world.n; r++)
        ck_assert_msg(is_through(world.rank[r].stream, 20), "rank %d's stream stands still", r);
    for (int g = 0; g < GROUPS; g++)
        check_and_free(m[g], count[g]);
    over();
}
END_TEST

/* Chunks of 4 MiB, and a message that is not a whole number of them. */
START_TEST(test_large)
{
    struct ry_err err;
    make(2, 30);
    struct message m[2] = {message(0, 1, (UINT64_C(33) << 20) + 7, 1), message(1, 0, UINT64_C(17) << 20, 2)};
    meet(ry_carrier_need(m[0].bytes + m[1].bytes, 2));
    for (int r = 0; r < 2; r++)
        ck_assert_msg(!begin(r, m, 2, &err), "%s", err.msg);
    for (int r = 0; r < 2; r++)
        ck_assert(is_through(world.rank[r].stream, 20));
    check_and_free(m, 2);
    over();
}
END_TEST

/* More than is held is refused before anything is enqueued; the carrier still works. */
START_TEST(test_no_room)
{
    struct ry_err err;
    make(2, 30);
    meet(1 << 20);
    struct message m = message(0, 1, ry_carrier_held(world.rank[0].carrier) + 1, 1), small = message(0, 1, 100, 2);
    ck_assert(begin(0, &m, 1, &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "staging memory"));
    ck_assert_int_eq(atomic_load(&((struct stream *)world.rank[0].stream)->pending), 0);
    free(m.out);
    free(m.in);
    for (int r = 0; r < 2; r++)
        ck_assert_msg(!begin(r, &small, 1, &err), "%s", err.msg);
    ck_assert(is_through(world.rank[1].stream, 20));
    ck_assert(is_through(world.rank[0].stream, 20));
    check_and_free(&small, 1);
    over();
    ry_run_staging_limit(1000);
    make(2, 30);
    ry_run_staging_limit(1000);
    ry_carrier_want(world.rank[0].carrier, 1 << 20);
    usleep(50000);
    ck_assert_uint_eq(ry_carrier_held(world.rank[0].carrier), 0);
    over();
    ry_run_staging_limit(UINT64_C(2) << 30);
}
END_TEST

/* Its peer never comes: the stream waits, until the communicator is aborted. */
START_TEST(test_abort)
{
    struct ry_err err;
    make(3, 30);
    meet(1 << 20);
    struct message m[2] = {message(1, 0, 1000, 1), message(0, 1, 300000, 2)};
    ck_assert_msg(!begin(0, m, 2, &err), "%s", err.msg);
    ck_assert(!is_through(world.rank[0].stream, 0.1));
    uint64_t t = ry_now_ns();
    ry_carrier_abort(world.rank[0].carrier);
    ck_assert(is_through(world.rank[0].stream, 5));
    ck_assert_msg(ry_now_ns() - t < 1000000000u, "it took that long");
    ck_assert_int_eq(ry_carrier_state(world.rank[0].carrier), RY_CROSS_CANNOT);
    ck_assert(begin(0, m, 2, &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "aborted"));
    ck_assert_int_eq(world.rank[0].failed, 0);
    over();
    for (int i = 0; i < 2; i++) {
        free(m[i].out);
        free(m[i].in);
    }
}
END_TEST

/* A peer dies that something is to come from: it is named, the stream goes on only when somebody aborts. */
START_TEST(test_lost)
{
    struct ry_err err;
    make(3, 0.3);
    meet(1 << 20);
    struct message m[2] = {message(2, 0, 1000, 1), message(1, 0, 1000, 2)};
    ck_assert_msg(!begin(0, m, 2, &err), "%s", err.msg);
    ck_assert_msg(!begin(1, m, 2, &err), "%s", err.msg);
    ck_assert(is_through(world.rank[1].stream, 5));
    ry_carrier_lost(world.rank[0].carrier, 2, "it was killed");
    for (int i = 0; i < 10000 && !atomic_load(&world.rank[0].hopeless); i++)
        pause_us(500);
    ck_assert_int_ne(world.rank[0].hopeless + 1, 0);
    ck_assert_int_eq(world.rank[0].peer, 2);
    ck_assert_str_eq(world.rank[0].why, "it was killed");
    ck_assert_int_eq(ry_carrier_state(world.rank[0].carrier), RY_CROSS_CANNOT);
    ck_assert(!is_through(world.rank[0].stream, 0.1));
    ck_assert(begin(0, m, 2, &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "rank 2: it was killed"));
    ry_carrier_abort(world.rank[0].carrier);
    ck_assert(is_through(world.rank[0].stream, 5));
    over();
    for (int i = 0; i < 2; i++) {
        free(m[i].out);
        free(m[i].in);
    }
}
END_TEST

/* Who dies after all has come from it harms nothing that is under way with others. */
START_TEST(test_lost_after)
{
    struct ry_err err;
    make(3, 30);
    meet(1 << 20);
    struct message m[2] = {message(2, 0, 1000, 1), message(1, 0, 1000, 2)};
    ck_assert_msg(!begin(0, m, 2, &err), "%s", err.msg);
    ck_assert_msg(!begin(2, m, 2, &err), "%s", err.msg);
    ck_assert(is_through(world.rank[2].stream, 5));
    usleep(20000);
    ry_carrier_lost(world.rank[0].carrier, 2, "it was killed");
    usleep(20000);
    ck_assert_msg(!begin(1, m, 2, &err), "%s", err.msg);
    ck_assert(is_through(world.rank[0].stream, 5));
    ck_assert_int_eq(world.rank[0].failed, 0);
    check_and_free(m, 2);
    over();
}
END_TEST

/* ---- a process that dies ---- */

/* The other end: rank 1 of 2, which is to send more than it ever will. Cards go over stdin and stdout. */
static int be_killed(void)
{
    struct ry_err err;
    struct ry_cross_transfer big = {true, 0, malloc(32u << 20), 32u << 20};
    char card[16384];
    uint32_t size;
    hubs[1] = ry_hub_start(&device, 0, false, &err);
    const bool with[2] = {true, false};
    struct ry_carrier_config config = {
        .hub = hubs[1], .device = &device, .nranks = 2, .rank = 1, .with = with, .patience = 30, .name = "killed"};
    struct ry_carrier *c = hubs[1] ? ry_carrier_new(&config, &err) : NULL;
    void *stream;
    size_t own;
    if (!c)
        return 1;
    d_stream_create(&stream, NULL);
    const void *mine = ry_carrier_card(c, &own);
    uint32_t length = (uint32_t)own;
    if (write(1, &length, 4) != 4 || write(1, mine, own) != (ssize_t)own || read(0, &size, 4) != 4 ||
        size > sizeof card || read(0, card, size) != (ssize_t)size || ry_carrier_meet(c, 0, card, size, &err))
        return 1;
    ry_carrier_want(c, 40u << 20);
    while (ry_carrier_state(c) != RY_CROSS_HAS || ry_carrier_held(c) < 32u << 20)
        pause_us(200);
    struct ry_cross *face = ry_carrier_face(c);
    memset(big.at, 1, big.bytes);
    if (face->begin(face, &big, 1, stream, &err))
        return 1;
    for (;;)
        sleep(1);
}

/* Nobody says so but UCX: the peer is named, and the stream is not let go. It dies before it has sent anything, or
 * amid. */
START_TEST(test_killed)
{
    struct ry_err err;
    int in[2], out[2];
    char card[16384];
    uint32_t size, length;
    size_t own;
    ck_assert(!pipe(in) && !pipe(out));
    pid_t pid = fork();
    if (!pid) {
        dup2(in[0], 0);
        dup2(out[1], 1);
        execl("/proc/self/exe", "test_carrier", "be-killed", NULL);
        _exit(127);
    }
    make(1, 0.5);
    bool with[2] = {false, true};
    ry_carrier_end(world.rank[0].carrier, false);
    struct ry_carrier_config config = {.hub = hubs[0],
                                       .device = &device,
                                       .nranks = 2,
                                       .with = with,
                                       .patience = 0.5,
                                       .name = "left",
                                       .failed = failed,
                                       .hopeless = hopeless,
                                       .context = &world.rank[0]};
    struct ry_carrier *c = world.rank[0].carrier = ry_carrier_new(&config, &err);
    const void *mine = ry_carrier_card(c, &own);
    length = (uint32_t)own;
    ck_assert(write(in[1], &length, 4) == 4 && write(in[1], mine, own) == (ssize_t)own);
    ck_assert(read(out[0], &size, 4) == 4 && size <= sizeof card && read(out[0], card, size) == (ssize_t)size);
    ck_assert(!ry_carrier_meet(c, 1, card, size, &err));
    wait_for_state(0, RY_CROSS_HAS);
    ry_carrier_want(c, 80u << 20);
    while (ry_carrier_held(c) < 64u << 20)
        pause_us(200);
    struct ry_cross *face = ry_carrier_face(c);
    struct ry_cross_transfer list[2] = {{false, 1, malloc(32u << 20), 32u << 20}, {false, 1, malloc(100), 100}};
    face->number = 7;
    ck_assert(!face->begin(face, list, 2, world.rank[0].stream, &err) && !face->end(face, world.rank[0].stream, &err));
    if (_i)
        pause_us(_i * 10000);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    uint64_t t = ry_now_ns();
    for (int i = 0; i < 20000 && !atomic_load(&world.rank[0].hopeless); i++)
        pause_us(500);
    printf("killed: %s, after %.2f s\n", world.rank[0].why, (double)(ry_now_ns() - t) / 1e9);
    ck_assert_int_eq(world.rank[0].failed, 7);
    ck_assert_int_eq(world.rank[0].hopeless, 7);
    ck_assert_int_eq(world.rank[0].peer, 1);
    ck_assert(!is_through(world.rank[0].stream, 0.1));
    ry_carrier_abort(c);
    ck_assert(is_through(world.rank[0].stream, 5));
    over();
    free(list[0].at);
    free(list[1].at);
    close(in[0]), close(in[1]), close(out[0]), close(out[1]);
}
END_TEST

/* Cards that are none; a device that cannot do it. */
START_TEST(test_refuses)
{
    struct ry_err err;
    make(2, 30);
    size_t size;
    const void *card = ry_carrier_card(world.rank[1].carrier, &size);
    ck_assert_int_eq(ry_carrier_meet(world.rank[0].carrier, 2, card, size, &err), -1);
    ck_assert_int_eq(ry_carrier_meet(world.rank[0].carrier, 1, card, size - 1, &err), -1);
    ck_assert_int_eq(ry_carrier_meet(world.rank[0].carrier, 1, card, 3, &err), -1);
    introduce(0, 1);
    introduce(0, 1);
    introduce(1, 0);
    wait_for_state(0, RY_CROSS_HAS);
    wait_for_state(1, RY_CROSS_HAS);
    over();
    no_words = true;
    bool with[2] = {false, true};
    struct ry_carrier_config config = {
        .hub = hubs[0], .device = &device, .nranks = 2, .with = with, .patience = 1, .name = "x"};
    ck_assert_ptr_null(ry_carrier_new(&config, &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "no such thing"));
    no_words = false;
}
END_TEST

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "be-killed"))
        return be_killed();
    Suite *s = suite_create("carrier");
    TCase *t = tcase_create("carrier");
    tcase_set_timeout(t, 60);
    tcase_add_loop_test(t, test_random, 0, 4);
    tcase_add_test(t, test_large);
    tcase_add_test(t, test_no_room);
    tcase_add_test(t, test_abort);
    tcase_add_test(t, test_lost);
    tcase_add_test(t, test_lost_after);
    tcase_add_loop_test(t, test_killed, 0, 3);
    tcase_add_test(t, test_refuses);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_set_fork_status(r, CK_NOFORK); /* UCX has threads */
    srunner_run_all(r, CK_NORMAL);
    int bad = srunner_ntests_failed(r);
    srunner_free(r);
    for (int i = 0; i < MOST; i++)
        ry_hub_abandon(hubs[i]);
    return bad ? 1 : 0;
}
