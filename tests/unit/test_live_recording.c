/* test_live_recording.c: recordings of live jobs: what is in them, going on with one, what interrupts leave behind. */
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "base/npy.h"
#include "live_world.h"
#include "place/routing_writer.h"

static int left_out(void)
{
    char file[160], text[2048], *at;
    snprintf(file, sizeof file, "%s/meta.json", folder);
    FILE *f = fopen(file, "r");
    ck_assert_ptr_nonnull(f);
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    ck_assert_ptr_nonnull(at = strstr(text, "\"left_out\": "));
    return atoi(at + 12);
}

static void observe(const struct world *w, struct sample *s, int n)
{
    draw(w, s, below(w->job.places));
    for (int i = 0; n < w->tokens && i < w->job.layers * w->job.experts; i++)
        s->counts[i] = s->counts[i] * (uint32_t)n / (uint32_t)w->tokens; /* of a shorter sample */
    ck_assert_msg(!railyard_live_observe(w->live, s->tokens, n, s->counts, NULL, 0), "%s", railyard_live_error());
}

START_TEST(records)
{
    static struct world w;
    static struct sample seen[20], s;
    make(&w, 4, 2, 2, 0);
    w.shift = 20;
    int n = 0, cells = w.job.layers * w.job.experts;
    for (int life = 0; life < 3; life++) { /* three jobs, one after the other */
        start(&w);
        ck_assert_int_eq(railyard_live_record_flush(w.live), -1);
        ck_assert_msg(!railyard_live_record(w.live, folder, w.tokens, 14), "%s", railyard_live_error());
        for (int i = 0; i < 5; i++)
            observe(&w, &seen[n++], w.tokens);
        observe(&w, &s, w.tokens / 2);
        if (life == 1)
            ck_assert_int_eq(railyard_live_record_flush(w.live), 0);
        else
            railyard_live_free(w.live);
        n = n > 14 ? 14 : n;
        struct ry_routing *r = opened(n);
        ck_assert_int_eq(left_out(), life + 1 + (life == 2)); /* the last one of 15 is beyond the limit */
        ck_assert(r->tokens32 && (const void *)r->tokens32 == r->maps[2].data); /* in place */
        ck_assert_int_eq(r->topk, 2);
        for (int i = 0; i < n; i++) {
            ck_assert_mem_eq(ry_tokens_at(r, i, NULL), seen[i].tokens, (size_t)w.tokens * sizeof *s.tokens);
            for (int c = 0; c < cells; c++)
                ck_assert_uint_eq(ry_counts_at(r, i, 0)[c], seen[i].counts[c]);
        }
        ry_routing_close(r);
        if (life == 1)
            railyard_live_free(w.live);
    }
    /* Another shape, and folders of others, are left alone. */
    start(&w);
    ck_assert_int_eq(railyard_live_record(w.live, folder, w.tokens + 1, 0), -1);
    ck_assert_msg(strstr(railyard_live_error(), "'tokens_per_sample' is 64, but this job has 65"), "%s",
                  railyard_live_error());
    ck_assert_int_eq(railyard_live_record(w.live, "/nowhere/at/all", w.tokens, 0), -1);
    ck_assert_int_eq(railyard_live_record(w.live, folder, 0, 0), -1);
    ck_assert_int_eq(railyard_live_record(w.live, folder, w.tokens, -1), -1);
    char file[160];
    snprintf(file, sizeof file, "%s/meta.json", folder);
    ck_assert_int_eq(unlink(file), 0);
    ck_assert_int_eq(railyard_live_record(w.live, folder, w.tokens, 0), -1);
    ck_assert_ptr_nonnull(strstr(railyard_live_error(), "no meta.json beside it"));
    FILE *f = fopen(file, "w");
    fprintf(f, "{\"layers\": %d, \"samples\": 3}", w.job.layers);
    fclose(f);
    ck_assert_int_eq(railyard_live_record(w.live, folder, w.tokens, 0), -1);
    ck_assert_ptr_nonnull(strstr(railyard_live_error(), "'growing' is not true"));
    railyard_live_free(w.live);
}
END_TEST

static void add(struct ry_routing_writer *w, uint32_t x, int expected)
{
    uint32_t tokens[4] = {x, x, x, x}, counts[4] = {4, 4, 0, 0};
    if (!expected)
        counts[0] = 65536;
    ck_assert_msg(ry_routing_writer_add(w, tokens, counts, &err) == expected, "%s", err.msg);
}

/* Whatever a job that is killed leaves behind, and whatever a reader meets while one writes. */
START_TEST(recordings_survive)
{
    struct ry_routing_shape shape = {1, 4, 2, 4};
    int ready[2];
    ck_assert_int_eq(pipe(ready), 0);
    pid_t child = fork();
    if (!child) {
        struct ry_routing_writer *w = ry_routing_writer_open(folder, &shape, &err);
        if (!w)
            _exit(1);
        for (uint32_t i = 0; i < 5; i++)
            add(w, i, 1);
        add(w, 9, 0);
        if (ry_routing_writer_flush(w, &err))
            _exit(2);
        add(w, 77, 1); /* never told of */
        if (write(ready[1], "x", 1) != 1)
            _exit(3);
        pause();
        _exit(4);
    }
    char c;
    ck_assert_int_eq((int)read(ready[0], &c, 1), 1);
    ck_assert_ptr_null(ry_routing_writer_open(folder, &shape, &err));
    ck_assert_msg(strstr(err.msg, "another process is recording"), "%s", err.msg);
    ry_routing_close(opened(5));
    ck_assert_int_eq(kill(child, SIGKILL), 0);
    ck_assert_int_eq(waitpid(child, NULL, 0), child);
    close(ready[0]);
    close(ready[1]);

    char header[RY_NPY_HEADER_BYTES], file[160]; /* killed between the headers and meta.json */
    ry_npy_header(header, RY_NPY_U16, 3, (size_t[]){6, 1, 4});
    snprintf(file, sizeof file, "%s/counts.npy", folder);
    int fd = open(file, O_RDWR);
    ck_assert_int_eq((int)pwrite(fd, header, sizeof header, 0), (int)sizeof header);
    close(fd);
    ry_routing_close(opened(5));
    struct ry_routing_writer *w = ry_routing_writer_open(folder, &shape, &err);
    ck_assert_msg(w != NULL, "%s", err.msg);
    ry_routing_close(opened(5));
    add(w, 5, 1);
    ry_routing_close(opened(5));
    ck_assert_int_eq((int)ry_routing_writer_samples(w), 6);
    ck_assert_int_eq(ry_routing_writer_close(w, &err), 0);
    struct ry_routing *r = opened(6);
    for (int i = 0; i < 6; i++)
        ck_assert_uint_eq(ry_tokens_at(r, i, NULL)[3], (uint32_t)i);
    ry_routing_close(r);
    ck_assert_int_eq(left_out(), 1);
    ck_assert_int_eq(truncate(file, 200), 0);
    ck_assert_ptr_null(ry_routing_writer_open(folder, &shape, &err));
    ck_assert_msg(strstr(err.msg, "counts.npy"), "%s", err.msg);
}
END_TEST

/* A full disk ends the recording, with one error; what was flushed stays readable, and learning goes on. */
START_TEST(disk_full)
{
    static struct world w;
    static struct sample s;
    make(&w, 4, 2, 2, 0);
    start(&w);
    ck_assert_int_eq(railyard_live_record(w.live, folder, w.tokens, 0), 0);
    for (int i = 0; i < 10; i++)
        observe(&w, &s, w.tokens);
    ck_assert_int_eq(railyard_live_record_flush(w.live), 0);
    struct rlimit before, low;
    getrlimit(RLIMIT_FSIZE, &before);
    low = before;
    low.rlim_cur = RY_NPY_HEADER_BYTES + 10 * 64 * 4 + 100;
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &low), 0);
    draw(&w, &s, 0);
    int got = railyard_live_observe(w.live, s.tokens, w.tokens, s.counts, NULL, 0);
    int next = railyard_live_observe(w.live, s.tokens, w.tokens, s.counts, NULL, 0);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &before), 0);
    ck_assert_int_eq(got, -1);
    ck_assert_msg(strstr(railyard_live_error(), "cannot be written"), "%s", railyard_live_error());
    ck_assert_int_eq(next, 0);
    ck_assert_uint_eq(state_of(&w).samples, 12);
    railyard_live_free(w.live);
    ry_routing_close(opened(10));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("live_recording");
    TCase *t = tcase_create("live_recording");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, records);
    tcase_add_test(t, recordings_survive);
    tcase_add_test(t, disk_full);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
