/*
 * trace.c: see trace.h. The folder, the two passes over each file, and the merge. One line's text is parsed in parse.c.
 *
 * Pass 1 reads what there is few of (heads, communicators, maps, ends), pass 2 the exchanges and durations: by then it
 * is known which ranks share a node, whichever file said so.
 */
#include "trace.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/npy.h"
#include "lines.h"
#include "parse.h"

#define MAX_RANKS (1 << 20)
#define RECENT 1024 /* exchanges that a duration can still be matched with */

/* ---- the growing parts of a trace ---- */

static void note(struct ry_trace *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void note(struct ry_trace *t, const char *fmt, ...)
{
    char **more = realloc(t->notes, (size_t)(t->nnotes + 1) * sizeof *more), *text = NULL;
    if (!more)
        return;
    t->notes = more;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&text, fmt, ap) >= 0)
        t->notes[t->nnotes++] = text;
    va_end(ap);
}

static struct ry_trace_comm *find_comm(const struct ry_trace *t, const char *id)
{
    for (int i = 0; i < t->ncomms; i++)
        if (!strcmp(t->comms[i]->id, id))
            return t->comms[i];
    return NULL;
}

static void free_rank(struct ry_trace_rank *r)
{
    if (!r)
        return;
    free(r->node);
    free(r->host);
    free(r->gpu);
    free(r->nic);
    free(r->matrix);
    free(r->sent); /* one block */
    free(r->times.classes);
    free(r);
}

static void free_comm(struct ry_trace_comm *c)
{
    if (!c)
        return;
    for (int i = 0; c->ranks && i < c->nranks; i++)
        free_rank(c->ranks[i]);
    for (int i = 0; i < c->nnodes; i++)
        free(c->hosts[i]);
    free(c->hosts);
    free(c->ranks);
    free(c->node);
    free(c->name);
    json_decref(c->counters);
    ry_agreed_free(&c->agreed);
    ry_local_free(&c->local);
    free(c);
}

void ry_trace_close(struct ry_trace *t)
{
    if (!t)
        return;
    for (int i = 0; i < t->ncomms; i++)
        free_comm(t->comms[i]);
    for (int i = 0; i < t->nprocesses; i++) {
        free(t->processes[i].file);
        free(t->processes[i].host);
    }
    for (int i = 0; i < t->nnotes; i++)
        free(t->notes[i]);
    free(t->comms);
    free(t->processes);
    free(t->notes);
    free(t->dir);
    free(t);
}

uint64_t ry_trace_bytes(const struct ry_trace_comm *c, int from, int to)
{
    uint64_t a = c->ranks[from] ? c->ranks[from]->sent[to] : 0, b = c->ranks[to] ? c->ranks[to]->received[from] : 0;
    return a > b ? a : b;
}

/* ---- pass 1 ---- */

static const char *text_of(const json_t *o, const char *key)
{
    const char *s = json_string_value(json_object_get(o, key));
    return s ? s : "";
}

static int64_t number_of(const json_t *o, const char *key, int64_t otherwise)
{
    const json_t *v = json_object_get(o, key);
    return json_is_integer(v) ? json_integer_value(v) : otherwise;
}

/* Short texts are ASCII by nature; anything else in them is damage, and must not break a terminal or a JSON text later.
 */
static void copy_text(char *to, size_t size, const char *from)
{
    size_t n = 0;
    for (; from[n] && n + 1 < size; n++)
        to[n] = from[n] < 32 || from[n] > 126 ? '?' : from[n];
    to[n] = 0;
}

/* Free texts (names, hosts) are UTF-8, as jansson has checked; control characters are taken out. */
static char *copy_name(const char *from)
{
    char *copy = strdup(from);
    for (char *c = copy; c && *c; c++)
        if ((unsigned char)*c < 32 || *c == 127)
            *c = '?';
    return copy;
}

static struct ry_trace_comm *new_comm(struct ry_trace *t, const json_t *line, int nranks)
{
    struct ry_trace_comm *c = calloc(1, sizeof *c), **more;
    if (!c)
        return NULL;
    ry_agreed_init(&c->agreed);
    c->nranks = nranks;
    c->ranks = calloc((size_t)nranks, sizeof *c->ranks);
    c->node = malloc((size_t)nranks * sizeof *c->node);
    c->counters = json_object();
    more = realloc(t->comms, (size_t)(t->ncomms + 1) * sizeof *more);
    if (more)
        t->comms = more;
    if (!more || !c->ranks || !c->node || !c->counters) {
        free_comm(c);
        return NULL;
    }
    for (int i = 0; i < nranks; i++)
        c->node[i] = -1;
    copy_text(c->id, sizeof c->id, text_of(line, "comm"));
    copy_text(c->parent, sizeof c->parent, text_of(line, "parent"));
    copy_text(c->birth, sizeof c->birth, text_of(line, "birth"));
    return t->comms[t->ncomms++] = c;
}

/* A communicator as one rank saw it born. */
static bool read_comm(struct ry_trace *t, int process, const json_t *line)
{
    int64_t nranks = number_of(line, "nranks", -1), rank = number_of(line, "rank", -1);
    const char *id = text_of(line, "comm"), *file = t->processes[process].file;
    if (nranks < 1 || nranks > MAX_RANKS || rank < 0 || rank >= nranks || !*id || strlen(id) > 16)
        return false;
    struct ry_trace_comm *c = find_comm(t, id);
    if (!c && !(c = new_comm(t, line, (int)nranks)))
        return false;
    if (c->nranks != nranks) {
        note(t, "%s: says that communicator %s has %d ranks, others say %d: its part is left out", file, id,
             (int)nranks, c->nranks);
        return true;
    }
    if (c->ranks[rank]) {
        note(t, "%s: rank %d of communicator %s is in %s already: this one is left out", file, (int)rank, id,
             t->processes[c->ranks[rank]->process].file);
        return true;
    }
    struct ry_trace_rank *r = calloc(1, sizeof *r);
    if (!r)
        return false;
    const json_t *seat = json_object_get(line, "seat");
    r->process = process;
    r->device = (int)number_of(line, "device", -1);
    r->node = copy_name(text_of(seat, "node"));
    r->host = copy_name(text_of(seat, "host"));
    r->gpu = copy_name(text_of(seat, "gpu"));
    r->nic = copy_name(text_of(seat, "nic"));
    r->nvlink_gbs = json_number_value(json_object_get(seat, "nvlink_gbs"));
    r->nic_gbs = json_number_value(json_object_get(seat, "nic_gbs"));
    r->matrix = copy_name(text_of(line, "matrix"));
    r->sent = calloc(4 * (size_t)nranks, sizeof *r->sent);
    if (!r->node || !r->host || !r->gpu || !r->nic || !r->matrix || !r->sent) {
        free_rank(r);
        return false;
    }
    r->received = r->sent + nranks;
    r->sends = r->received + nranks;
    r->receives = r->sends + nranks;
    if (!c->name && *text_of(line, "name"))
        c->name = copy_name(text_of(line, "name"));
    c->ranks[rank] = r;
    c->present++;
    return true;
}

static void set_hosts(struct ry_trace_comm *c, int nnodes)
{
    c->hosts = calloc((size_t)nnodes, sizeof *c->hosts);
    c->nnodes = c->hosts ? nnodes : 0;
    for (int i = 0; i < c->nnodes; i++)
        if (!(c->hosts[i] = strdup("")))
            c->nnodes = i;
}

static bool read_map(struct ry_trace *t, const json_t *line)
{
    struct ry_trace_comm *c = find_comm(t, text_of(line, "comm"));
    const json_t *node = json_object_get(line, "node"), *hosts = json_object_get(line, "hosts");
    if (!c || c->mapped || json_object_get(line, "missing"))
        return c;
    int64_t nnodes = number_of(line, "nodes", -1);
    if (nnodes < 1 || nnodes > c->nranks || json_array_size(node) != (size_t)c->nranks ||
        json_array_size(hosts) != (size_t)nnodes)
        return false;
    for (int i = 0; i < c->nranks; i++) {
        const json_t *v = json_array_get(node, (size_t)i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= nnodes)
            return false;
    }
    set_hosts(c, (int)nnodes);
    for (int i = 0; i < c->nranks && c->nnodes == nnodes; i++)
        c->node[i] = (int)json_integer_value(json_array_get(node, (size_t)i));
    for (int i = 0; i < c->nnodes; i++) {
        const char *s = json_string_value(json_array_get(hosts, (size_t)i));
        char *copy = copy_name(s ? s : "");
        if (copy) {
            free(c->hosts[i]);
            c->hosts[i] = copy;
        }
    }
    c->mapped = c->nnodes > 0;
    return true;
}

/* The rank of a line, if it is this file's. */
static struct ry_trace_rank *find_rank(const struct ry_trace *t, int process, const char *id, int64_t rank,
                                       struct ry_trace_comm **comm)
{
    struct ry_trace_comm *c = find_comm(t, id);
    *comm = c;
    if (!c || rank < 0 || rank >= c->nranks || !c->ranks[rank] || c->ranks[rank]->process != process)
        return NULL;
    return c->ranks[rank];
}

static void read_comm_end(struct ry_trace_comm *c, struct ry_trace_rank *r, const json_t *line)
{
    copy_text(r->how, sizeof r->how, text_of(line, "how"));
    int64_t exchanges = number_of(line, "exchanges", 0), dropped = number_of(line, "dropped_exchanges", 0);
    if (exchanges > 0 && (uint64_t)exchanges > r->exchanges)
        r->exchanges = (uint64_t)exchanges;
    if (dropped > 0 && (uint64_t)dropped > r->dropped)
        r->dropped = (uint64_t)dropped;
    dropped = number_of(line, "dropped_durations", 0);
    if (dropped > 0 && (uint64_t)dropped > r->dropped_durations)
        r->dropped_durations = (uint64_t)dropped;
    const char *key;
    json_t *value;
    json_object_foreach(json_object_get(line, "counters"), key, value)
    {
        if (!json_is_integer(value) || json_integer_value(value) < 0)
            continue;
        json_int_t sum;
        if (__builtin_add_overflow(number_of(c->counters, key, 0), json_integer_value(value), &sum))
            continue;
        json_object_set_new(c->counters, key, json_integer(sum));
        c->counted = true;
    }
}

static bool read_rare(struct ry_trace *t, int process, const json_t *line)
{
    struct ry_trace_process *p = &t->processes[process];
    const char *kind = text_of(line, "t");
    if (!strcmp(kind, "comm"))
        return read_comm(t, process, line);
    if (!strcmp(kind, "map"))
        return read_map(t, line);
    if (!strcmp(kind, "end")) {
        int64_t dropped = number_of(line, "dropped", 0), unwritten = number_of(line, "not_written", 0);
        p->ended = true;
        p->dropped = dropped > 0 ? (uint64_t)dropped : 0;
        p->not_written = unwritten > 0 ? (uint64_t)unwritten : 0;
        copy_text(p->stopped, sizeof p->stopped, text_of(line, "stopped"));
        return true;
    }
    struct ry_trace_comm *c;
    struct ry_trace_rank *r = find_rank(t, process, text_of(line, "comm"), number_of(line, "rank", -1), &c);
    if (!strcmp(kind, "matrix") || !strcmp(kind, "drop") || !strcmp(kind, "comm_end")) {
        if (!r) {
            p->orphan_lines++;
            return true;
        }
        int64_t exchanges = number_of(line, "exchanges", 0), durations = number_of(line, "durations", 0);
        if (*kind == 'c') {
            read_comm_end(c, r, line);
        } else if (exchanges >= 0 && durations >= 0) {
            if (*kind == 'm') {
                r->saved = (uint64_t)exchanges;
                if (r->saved > r->exchanges)
                    r->exchanges = r->saved;
            } else {
                r->dropped += (uint64_t)exchanges;
                r->dropped_durations += (uint64_t)durations;
            }
        }
    }
    return true; /* kinds that a later version of the same schema adds are passed over */
}

/* ---- pass 2 ---- */

/* What is needed of the last exchanges of a rank, to match durations, in either order. */
struct recent {
    struct line {
        uint64_t number;             /* + 1; 0: none */
        uint64_t bytes, cross, busy; /* busy: to or from other ranks, whichever is more */
        int strategy;                /* -1: carried out both ways to be verified: its duration tells nothing */
        struct ry_agreed_plain plain;
    } exchange[RECENT];
    struct {
        uint64_t number;
        double us;
    } duration[RECENT];
};

struct pass2 {
    struct ry_trace *t;
    int process;
    /* the (communicator, rank) of the line before: mostly that of the next line too */
    struct ry_trace_comm *comm;
    struct ry_trace_rank *rank;
    int rank_number;
    struct slot {
        struct ry_trace_rank *rank;
        struct recent *recent;
    } * slots;
    int nslots;
};

static struct recent *recent_of(struct pass2 *s, struct ry_trace_rank *r)
{
    for (int i = 0; i < s->nslots; i++)
        if (s->slots[i].rank == r)
            return s->slots[i].recent;
    struct slot *more = realloc(s->slots, (size_t)(s->nslots + 1) * sizeof *more);
    if (!more)
        return NULL;
    s->slots = more;
    s->slots[s->nslots] = (struct slot){r, calloc(1, sizeof(struct recent))};
    return s->slots[s->nslots++].recent;
}

/* Called by the parser when it knows whose line it is: how many ranks, or 0 when it is nobody's. */
static int pick_rank(void *ctx, const char *id, uint64_t rank)
{
    struct pass2 *s = ctx;
    if (!s->comm || strcmp(s->comm->id, id) || (uint64_t)s->rank_number != rank) {
        s->rank = find_rank(s->t, s->process, id, rank > MAX_RANKS ? -1 : (int64_t)rank, &s->comm);
        s->rank_number = (int)rank;
        if (!s->rank)
            s->comm = NULL;
    }
    return s->comm ? s->comm->nranks : 0;
}

static uint64_t add(uint64_t a, uint64_t b)
{
    uint64_t sum;
    return __builtin_add_overflow(a, b, &sum) ? UINT64_MAX : sum;
}

/* The duration of a line's exchange is known. */
static void match(const struct pass2 *s, const struct line *x, double us)
{
    struct ry_trace_times *t = &s->rank->times;
    t->bytes = add(t->bytes, x->bytes);
    t->cross_bytes = add(t->cross_bytes, x->cross);
    t->matched_us += us;
    if (x->strategy >= 0)
        ry_agreed_duration(&s->comm->agreed, x->number - 1, x->strategy, x->busy, us, x->plain);
}

static void count_kinds(struct ry_trace_comm *c, const struct ry_parsed *x)
{
    int i = 0;
    while (i < c->ntypes && strcmp(c->types[i].name, x->type))
        i++;
    if (i < RY_TRACE_TYPES) {
        if (i == c->ntypes) {
            c->ntypes++;
            copy_text(c->types[i].name, sizeof c->types[i].name, x->type);
        }
        c->types[i].exchanges++;
    }
    if (x->row) {
        uint64_t bytes = x->row * x->type_bytes;
        for (i = 0; i < c->nrows && (c->rows[i].bytes != bytes || strcmp(c->rows[i].source, x->row_by));)
            i++;
        if (i < RY_TRACE_ROWS) {
            if (i == c->nrows) {
                c->nrows++;
                c->rows[i].bytes = bytes;
                copy_text(c->rows[i].source, sizeof c->rows[i].source, x->row_by);
            }
            c->rows[i].exchanges++;
        }
    }
    if (x->gather_count) {
        c->gathers++;
        c->gather_count = x->gather_count;
        copy_text(c->gather_comm, sizeof c->gather_comm, x->gather_comm);
    }
    c->one_call += x->one_call;
    c->captured += x->captured;
    if (x->wall_ns && (!c->first_ns || x->wall_ns < c->first_ns))
        c->first_ns = x->wall_ns;
    if (x->wall_ns > c->last_ns)
        c->last_ns = x->wall_ns;
}

/* What the line says of the agreement. Returns the strategy that its duration counts for, -1: none. */
static int take_agreement(struct ry_trace_comm *c, struct ry_trace_rank *r, const struct ry_parsed *x)
{
    if (!*x->strategy)
        return RY_TRACE_PLAIN;
    char name[sizeof x->strategy];
    copy_text(name, sizeof name, x->strategy);
    int strategy = ry_agreed_strategy(&c->agreed, name);
    r->by_strategy[strategy]++;
    r->verified += x->verify;
    ry_agreed_wait(&c->agreed, x->waited_us, x->late_us);
    return x->verify ? -1 : strategy;
}

static void take_way(struct ry_trace_comm *c, const struct ry_parsed *x, struct line *line)
{
    struct ry_trace_way *way = ry_ways_of(&c->ways, x->way);
    if (!way)
        return;
    way->lines++;
    way->cross = add(way->cross, line->cross);
    if (*x->strategy && strcmp(x->strategy, "direct")) /* else it is plain NCCL itself */
        line->plain = (struct ry_agreed_plain){1 + (int)(way - c->ways.way), x->plain_us};
}

static void take_rows(struct ry_trace_comm *c, const struct ry_parsed *x)
{
    struct ry_trace_way *way = ry_ways_of(&c->ways, x->way);
    if (!way)
        return;
    if (!strcmp(x->strategy, "sum")) { /* nothing was searched: what crosses follows from the exchange that it answers */
        way->summed++;
        way->summed_from = add(way->summed_from, x->cross);
        way->summed_to = add(way->summed_to, x->packed);
        return;
    }
    way->searched++;
    way->rows = add(way->rows, x->rows);
    way->distinct = add(way->distinct, x->distinct);
    way->zero = add(way->zero, x->zero);
    way->from_bytes = add(way->from_bytes, x->cross);
    way->to_bytes = add(way->to_bytes, x->packed);
    way->waited += x->waited_us > 0;
    way->waited_us += x->waited_us;
    if (strcmp(x->strategy, "dedup"))
        return;
    way->packed++;
    way->packed_from = add(way->packed_from, x->cross);
    way->packed_to = add(way->packed_to, x->packed);
}

static void take_exchange(struct pass2 *s, const struct ry_parsed *x)
{
    struct ry_trace_comm *c = s->comm;
    struct ry_trace_rank *r = s->rank;
    struct line line = {.number = x->number + 1};
    uint64_t to_others = 0, from_others = 0;
    int mine = c->node[s->rank_number];
    for (int i = 0; i < c->nranks; i++) {
        uint64_t out = x->send[i] * x->type_bytes,
                 in = x->recv[i] * x->type_bytes; /* the parser checked for overflow */
        r->sent[i] = add(r->sent[i], out);
        r->received[i] = add(r->received[i], in);
        r->sends[i] += out != 0;
        r->receives[i] += in != 0;
        line.bytes = add(line.bytes, out);
        if (c->node[i] != mine)
            line.cross = add(line.cross, out);
        if (i != s->rank_number) {
            to_others = add(to_others, out);
            from_others = add(from_others, in);
        }
    }
    line.busy = to_others > from_others ? to_others : from_others;
    line.strategy = take_agreement(c, r, x);
    take_way(c, x, &line);
    ry_local_add(&c->local, x->way, x->number, s->rank_number, c->nranks, c->node, c->nnodes, x->send, x->type_bytes);
    r->lines++;
    if (x->number != UINT64_MAX && x->number + 1 > r->exchanges && x->number < r->lines + r->dropped + (1 << 20))
        r->exchanges = x->number + 1;
    count_kinds(c, x);
    struct recent *recent = recent_of(s, r);
    if (!recent)
        return;
    size_t at = x->number % RECENT;
    if (recent->duration[at].number == line.number) {
        match(s, &line, recent->duration[at].us);
        recent->duration[at].number = 0;
    } else {
        recent->exchange[at] = line;
    }
}

static void take_duration(struct pass2 *s, const struct ry_parsed *x)
{
    struct ry_trace_rank *r = s->rank;
    ry_trace_times_add(&r->times, x->us);
    struct recent *recent = recent_of(s, r);
    if (!recent)
        return;
    size_t at = x->number % RECENT;
    if (recent->exchange[at].number == x->number + 1) {
        match(s, &recent->exchange[at], x->us);
        recent->exchange[at].number = 0;
    } else {
        recent->duration[at].number = x->number + 1;
        recent->duration[at].us = x->us;
    }
}

/* ---- files ---- */

static bool read_head(struct ry_trace *t, const char *file, const char *line, size_t n, struct ry_trace_process *p)
{
    json_t *head = json_loadb(line, n, JSON_REJECT_DUPLICATES, NULL);
    bool good = head && !strcmp(text_of(head, "t"), "head") && !strcmp(text_of(head, "schema"), RY_TRACE_SCHEMA);
    int64_t version = number_of(head, "version", -1);
    if (!good) {
        note(t, "%s: does not begin with the head line of a trace (empty, cut off or damaged): left out", file);
    } else if (version != RY_TRACE_VERSION) {
        note(t,
             "%s: is of schema version %lld, this railyard reads version %d: left out; read it with the Railyard that "
             "wrote it (%s)",
             file, (long long)version, RY_TRACE_VERSION, text_of(head, "railyard"));
        good = false;
    } else {
        p->host = copy_name(text_of(head, "host"));
        p->pid = (int)number_of(head, "pid", 0);
        p->nccl = (int)number_of(head, "nccl", 0);
        p->env_rank = (int)number_of(head, "env_rank", -1);
        p->env_world = (int)number_of(head, "env_world_size", -1);
        p->wall_ns = (uint64_t)number_of(head, "wall_ns", 0);
        copy_text(p->railyard, sizeof p->railyard, text_of(head, "railyard"));
        good = p->host;
    }
    json_decref(head);
    return good;
}

/* Read one line: false when it is damaged. */
static bool read_line(struct pass2 *s, int pass, const char *line, size_t n, struct ry_parsed *x)
{
    bool plain = ry_parse_is_frequent(line, n);
    if (pass == 1 && plain)
        return true;
    if (plain) {
        switch (ry_parse_frequent(x, line, n, pick_rank, s)) {
        case RY_PARSED_EXCHANGE:
            take_exchange(s, x);
            return true;
        case RY_PARSED_DURATION:
            take_duration(s, x);
            return true;
        case RY_PARSED_ROWS:
            take_rows(s->comm, x);
            return true;
        case RY_PARSED_ORPHAN:
            s->t->processes[s->process].orphan_lines++;
            return true;
        case RY_PARSED_BAD:
            return false;
        }
    }
    if (pass == 2)
        return true; /* damaged ones were counted in pass 1 */
    json_t *o = json_loadb(line, n, JSON_REJECT_DUPLICATES, NULL);
    bool good = json_is_object(o) && read_rare(s->t, s->process, o);
    json_decref(o);
    return good;
}

/* One pass over one file. In pass 1 a process is added, and taken back when the file cannot be read. */
static void read_file(struct ry_trace *t, const char *file, int pass, int process)
{
    char path[4096], *line = NULL;
    size_t room = 0;
    snprintf(path, sizeof path, "%s/%s", t->dir, file);
    FILE *f = fopen(path, "re");
    if (!f) {
        if (pass == 1)
            note(t, "%s: cannot be opened: %s", file, strerror(errno));
        return;
    }
    setvbuf(f, NULL, _IOFBF, 1 << 18);
    struct pass2 s = {.t = t, .process = process};
    struct ry_parsed x = {0};
    bool cut = false;
    uint64_t bad = 0;
    for (ssize_t n, i = 0; (n = getline(&line, &room, f)) > 0; i++) {
        if (pass == 1) {
            t->lines++;
            t->bytes += (uint64_t)n;
        }
        cut = line[n - 1] != '\n';
        size_t len = (size_t)n - !cut;
        if (i) {
            bool good = read_line(&s, pass, line, len, &x);
            if (!good && !cut)
                bad++;
            cut &= !good; /* a last line that lacks only its newline is complete */
            continue;
        }
        cut = false; /* a head is whole or it is none */
        if (pass == 2)
            continue;
        struct ry_trace_process p = {.file = strdup(file)}, *more;
        if (!p.file || !read_head(t, file, line, len, &p) ||
            !(more = realloc(t->processes, (size_t)(t->nprocesses + 1) * sizeof *more))) {
            free(p.file);
            free(p.host);
            goto out;
        }
        t->processes = more;
        s.process = t->nprocesses;
        t->processes[t->nprocesses++] = p;
    }
    if (ferror(f))
        note(t, "%s: reading stopped: %s", file, strerror(errno));
    if (s.process >= t->nprocesses) { /* an empty file */
        note(t, "%s: is empty: left out", file);
        goto out;
    }
    t->processes[s.process].bad_lines += bad;
    if (cut)
        note(t, "%s: its last line is cut off, as after a kill", file);
out:
    for (int i = 0; i < s.nslots; i++)
        free(s.slots[i].recent);
    free(s.slots);
    ry_parsed_free(&x);
    free(line);
    fclose(f);
}

/* Nodes from the seats of the ranks that are there, for a communicator whose map nobody wrote. */
static void map_from_seats(struct ry_trace_comm *c)
{
    int nnodes = 0, *first = malloc((size_t)c->nranks * sizeof *first);
    if (!first)
        return;
    for (int i = 0; i < c->nranks; i++) {
        const struct ry_trace_rank *r = c->ranks[i];
        if (!r || !*r->node)
            continue;
        int k = 0;
        while (k < nnodes && strcmp(c->ranks[first[k]]->node, r->node))
            k++;
        if (k == nnodes)
            first[nnodes++] = i;
        c->node[i] = k;
    }
    set_hosts(c, nnodes);
    for (int k = 0; k < c->nnodes; k++) {
        char *copy = strdup(c->ranks[first[k]]->host);
        if (copy) {
            free(c->hosts[k]);
            c->hosts[k] = copy;
        }
    }
    if (c->nnodes < nnodes)
        for (int i = 0; i < c->nranks; i++)
            c->node[i] = -1;
    free(first);
}

/* Lines and matrix both count from below: where they differ, the greater is nearer to the truth. */
static void merge_matrix(struct ry_trace *t, struct ry_trace_comm *c, int rank)
{
    struct ry_trace_rank *r = c->ranks[rank];
    if (!*r->matrix || strchr(r->matrix, '/') || (!r->saved && !r->exchanges))
        return;
    char path[4096];
    struct ry_err err;
    struct ry_npy npy;
    snprintf(path, sizeof path, "%s/%s", t->dir, r->matrix);
    if (ry_npy_open(&npy, path, &err)) {
        if (r->saved) /* else none was due yet */
            note(t, "rank %d of communicator %s: the sums of its lines are used, for its matrix cannot be read: %s",
                 rank, c->id, err.msg);
        return;
    }
    size_t n = (size_t)c->nranks;
    if (npy.type != RY_NPY_U64 || npy.ndim != 2 || npy.shape[0] < 4 || npy.shape[1] != n) {
        note(t, "%s: is no matrix of %d ranks: the sums of the lines are used", r->matrix, c->nranks);
    } else {
        const uint64_t *m = npy.data;
        bool whole = r->lines == r->exchanges && r->saved == r->exchanges && !r->dropped, same = true;
        for (size_t i = 0; i < 4 * n; i++) {
            same &= r->sent[i] == m[i];
            if (m[i] > r->sent[i])
                r->sent[i] = m[i];
        }
        if (whole && !same)
            note(t,
                 "rank %d of communicator %s: its lines and its matrix differ although both are complete: one is "
                 "damaged",
                 rank, c->id);
    }
    ry_npy_close(&npy);
}

static void note_missing(struct ry_trace *t, struct ry_trace_comm *c)
{
    if (c->present == c->nranks)
        return;
    char list[256];
    size_t n = 0;
    list[0] = 0;
    for (int i = 0; i < c->nranks && n < sizeof list - 32; i++)
        if (!c->ranks[i])
            n += (size_t)snprintf(list + n, sizeof list - n, "%s%d", n ? ", " : "", i);
    note(t, "communicator %s: %d of its %d ranks are missing: %s%s", c->id, c->nranks - c->present, c->nranks, list,
         n >= sizeof list - 32 ? ", …" : "");
}

static void note_processes(struct ry_trace *t)
{
    int open = 0;
    const char *example = "";
    for (int i = 0; i < t->nprocesses; i++) {
        const struct ry_trace_process *p = &t->processes[i];
        if (p->bad_lines)
            note(t, "%s: %llu damaged line%s skipped", p->file, (unsigned long long)p->bad_lines,
                 p->bad_lines == 1 ? "" : "s");
        if (p->orphan_lines)
            note(t, "%s: %llu line%s of communicators whose first line is missing skipped", p->file,
                 (unsigned long long)p->orphan_lines, p->orphan_lines == 1 ? "" : "s");
        if (!strcmp(p->stopped, "limit"))
            note(t,
                 "%s: reached its size limit: %llu exchanges are only in the sums (raise RAILYARD_TRACE_MAX to keep "
                 "more)",
                 p->file, (unsigned long long)p->not_written);
        else if (*p->stopped)
            note(t, "%s: recording stopped early: %s", p->file, p->stopped);
        if (!p->ended) {
            open++;
            example = p->file;
        }
        for (int k = 0; k < i; k++)
            if (p->env_rank >= 0 && p->env_rank == t->processes[k].env_rank &&
                p->env_world == t->processes[k].env_world) {
                note(t, "%s and %s are both of RANK %d: the folder holds more than one run", t->processes[k].file,
                     p->file, p->env_rank);
                i = t->nprocesses; /* said once; the rest would be the same */
                break;
            }
    }
    if (open)
        note(t, "%d of %d processes have no end line (killed, or still running), such as %s", open, t->nprocesses,
             example);
}

static int is_trace(const struct dirent *d)
{
    size_t n = strlen(d->d_name);
    return n > 12 && !strncmp(d->d_name, "trace-", 6) && !strcmp(d->d_name + n - 6, ".jsonl");
}

struct ry_trace *ry_trace_open(const char *dir, struct ry_err *err)
{
    struct dirent **files = NULL;
    int n = scandir(dir, &files, is_trace, versionsort);
    if (n < 0) {
        ry_fail(err, "%s: cannot be read: %s", dir, strerror(errno));
        return NULL;
    }
    struct ry_trace *t = calloc(1, sizeof *t);
    if (t && (t->dir = strdup(dir))) {
        for (int i = 0; i < n; i++)
            read_file(t, files[i]->d_name, 1, t->nprocesses);
        for (int i = 0; i < t->ncomms; i++)
            if (!t->comms[i]->mapped)
                map_from_seats(t->comms[i]);
        for (int i = 0; i < t->nprocesses; i++)
            read_file(t, t->processes[i].file, 2, i);
        for (int i = 0; i < t->ncomms; i++) {
            for (int k = 0; k < t->comms[i]->nranks; k++)
                if (t->comms[i]->ranks[k])
                    merge_matrix(t, t->comms[i], k);
            ry_agreed_finish(&t->comms[i]->agreed, &t->comms[i]->ways);
            note_missing(t, t->comms[i]);
        }
        note_processes(t);
    }
    for (int i = 0; i < n; i++)
        free(files[i]);
    free(files);
    if (t && t->nprocesses)
        return t;
    if (!n)
        ry_fail(
            err,
            "%s: holds no trace (no trace-*.jsonl); was RAILYARD_TRACE set to this folder, and did the job use NCCL?",
            dir);
    else
        ry_fail(err, "%s: none of its %d traces can be read: %s", dir, n,
                t && t->nnotes ? t->notes[0] : "out of memory");
    ry_trace_close(t);
    return NULL;
}
