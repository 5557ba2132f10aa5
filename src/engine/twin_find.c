/* twin_find.c: see twin_find.h. */
#include "twin_find.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/log.h"

#define MAGIC "RYTWIN1"
#define NEW ".new"        /* behind the name of a card that is being made */
#define MAKING_SECONDS 60 /* that may take, by far */

/* What a card holds. */
struct content {
    char magic[8];
    uint64_t key;
    uint32_t size, spare;
    char address[RY_TWIN_ADDRESS];
};

struct ry_twin_card {
    int fd; /* holds the lock: closing any other descriptor of that file in this process would end it, so nobody opens
               it again */
    struct content content;
    char folder[200], prefix[40], path[300];
};

static const char *folder_for_tests;

void ry_twin_folder(const char *path)
{
    folder_for_tests = path;
}

/* Communicators of each kind that this process told of. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct kind {
    struct kind *next;
    uint64_t hash;
    uint32_t cards;
} * kinds;

static uint32_t count(uint64_t hash)
{
    uint32_t n = 0;
    pthread_mutex_lock(&lock);
    struct kind *k = kinds;
    while (k && k->hash != hash)
        k = k->next;
    if (!k && (k = calloc(1, sizeof *k))) {
        k->hash = hash;
        k->next = kinds;
        kinds = k;
    }
    if (k)
        n = k->cards++;
    pthread_mutex_unlock(&lock);
    return n;
}

static uint64_t hash_text(uint64_t h, const char *s)
{
    return XXH64(s ? s : "", s ? strlen(s) + 1 : 0, h);
}

/* Of all that twins have in common, and communicators of other jobs have not. */
static uint64_t kind_of(const struct ry_cluster *map, int rank)
{
    static const char *const launchers[] = {"MASTER_ADDR",   "MASTER_PORT",    "TORCHELASTIC_RUN_ID",    "SLURM_JOB_ID",
                                            "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"};
    const struct ry_seat *own = &map->seats[rank];
    struct {
        uint32_t settings;
        int32_t nranks, rank, spare;
    } numbers = {own->settings_hash, map->nranks, rank, 0};
    uint64_t h = XXH64(&numbers, sizeof numbers, 0);
    h = hash_text(h, own->railyard);
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++)
        h = hash_text(h, getenv(launchers[i]));
    for (int r = 0; r < map->nranks; r++)
        h = hash_text(h, map->seats[r].node);
    return h;
}

/* Is it a file of a process that is no more? `fd` is of a card, of another process: see struct ry_twin_card. */
static bool left_behind(int fd)
{
    struct flock by = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return !fcntl(fd, F_GETLK, &by) && by.l_type == F_UNLCK;
}

/* The process's number in a card's name; -1: it is none. */
static int maker_of(const char *name)
{
    int pid, end = -1;
    if (sscanf(name, "%*16[0-9a-f].%*u.%*16[0-9a-f].%d%n", &pid, &end) != 1 || end < 0)
        return -1;
    return !name[end] || !strcmp(name + end, NEW) ? pid : -1;
}

/* Of other kinds than ours nobody may ever look again. */
static void sweep(const char *folder)
{
    char path[600];
    struct stat st;
    DIR *dir = opendir(folder);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        int pid = maker_of(e->d_name);
        if (pid < 0 || pid == (int)getpid())
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        if (fd < 0)
            continue;
        bool is_new = strstr(e->d_name, NEW); /* it has no lock yet */
        if (!fstat(fd, &st) && (!is_new || time(NULL) - st.st_mtime > MAKING_SECONDS) && left_behind(fd))
            unlink(path);
        close(fd);
    }
    if (dir)
        closedir(dir);
}

static int write_card(struct ry_twin_card *c, struct ry_err *err)
{
    struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    struct stat st;
    char made[320];
    if (mkdir(c->folder, 0700) && errno != EEXIST)
        return ry_fail(err, "%s: %s", c->folder, strerror(errno));
    if (lstat(c->folder, &st) || !S_ISDIR(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 022))
        return ry_fail(err, "%s is not a folder that only this user may write to", c->folder);
    sweep(c->folder);
    /* Under another name until it is locked: without its lock it would be taken for one that a dead process left. */
    snprintf(made, sizeof made, "%s" NEW, c->path);
    c->fd = open(made, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (c->fd < 0 && errno == EEXIST && !unlink(made)) /* of an earlier process with our number */
        c->fd = open(made, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (c->fd < 0)
        return ry_fail(err, "%s: %s", made, strerror(errno));
    ssize_t n = write(c->fd, &c->content, sizeof c->content);
    if (n != (ssize_t)sizeof c->content || fcntl(c->fd, F_SETLK, &all) || rename(made, c->path)) {
        ry_fail(err, "%s: %s", made, n >= 0 && n < (ssize_t)sizeof c->content ? "no room" : strerror(errno));
        unlink(made);
        close(c->fd);
        return -1;
    }
    return 0;
}

struct ry_twin_card *ry_twin_card_new(const struct ry_cluster *map, int rank, uint64_t key, const void *address,
                                      size_t size, struct ry_err *err)
{
    struct ry_twin_card *c = calloc(1, sizeof *c);
    if (!c || size > sizeof c->content.address) {
        free(c);
        return ry_fail(err, size > RY_TWIN_ADDRESS ? "the yardmaster's address is too long" : "out of memory"), NULL;
    }
    uint64_t kind = kind_of(map, rank);
    memcpy(c->content.magic, MAGIC, sizeof c->content.magic);
    c->content.key = key;
    c->content.size = (uint32_t)size;
    if (size)
        memcpy(c->content.address, address, size);
    if (folder_for_tests)
        snprintf(c->folder, sizeof c->folder, "%s", folder_for_tests);
    else
        snprintf(c->folder, sizeof c->folder, "/dev/shm/railyard-%u", (unsigned)geteuid());
    snprintf(c->prefix, sizeof c->prefix, "%016" PRIx64 ".%u.", kind, count(kind));
    snprintf(c->path, sizeof c->path, "%s/%s%016" PRIx64 ".%d", c->folder, c->prefix, key, (int)getpid());
    if (write_card(c, err)) {
        free(c);
        return NULL;
    }
    return c;
}

void ry_twin_card_free(struct ry_twin_card *c)
{
    if (!c)
        return;
    unlink(c->path);
    close(c->fd);
    rmdir(c->folder); /* which succeeds for the last */
    free(c);
}

/* The card at `path`, of another process: true if that is alive. */
static bool read_card(const char *path, struct content *content)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return false;
    bool alive = !left_behind(fd);
    if (!alive)
        unlink(path);
    bool good = alive && !fstat(fd, &st) && st.st_uid == geteuid() &&
                read(fd, content, sizeof *content) == (ssize_t)sizeof *content &&
                !memcmp(content->magic, MAGIC, sizeof content->magic) && content->size <= sizeof content->address;
    close(fd);
    return good;
}

/* In order; false if there is one too many, or two of one key. */
static bool add(struct ry_twin_found *f, const struct content *card)
{
    int at = 0;
    while (at < f->n && f->key[at] < card->key)
        at++;
    if (f->n == RY_TWINS || (at < f->n && f->key[at] == card->key))
        return false;
    memmove(f->key + at + 1, f->key + at, (size_t)(f->n - at) * sizeof *f->key);
    f->key[at] = card->key;
    f->n++;
    if (!at) {
        memcpy(f->first, card->address, card->size);
        f->first_size = card->size;
    }
    return true;
}

void ry_twin_look(const struct ry_twin_card *c, struct ry_twin_found *f)
{
    struct ry_twin_found own = {0};
    char path[600];
    bool good = true;
    add(&own, &c->content);
    *f = own;
    DIR *dir = opendir(c->folder);
    for (struct dirent *e; dir && good && (e = readdir(dir));) {
        uint64_t key;
        int pid, end = -1;
        size_t n = strlen(c->prefix);
        if (strncmp(e->d_name, c->prefix, n) || sscanf(e->d_name + n, "%16" SCNx64 ".%d%n", &key, &pid, &end) != 2 ||
            e->d_name[n + (size_t)end] || pid == (int)getpid())
            continue; /* among them those of this process: see struct ry_twin_card */
        struct content card;
        snprintf(path, sizeof path, "%s/%s", c->folder, e->d_name);
        if (read_card(path, &card))
            good = card.key == key && add(f, &card);
    }
    if (dir)
        closedir(dir);
    if (!good)
        *f = own;
}
