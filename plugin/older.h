/*
 * older.h: functions that an older NCCL lacks, done with what it has.
 *
 * A program may ask whether NCCL has a function (a weak reference, dlsym) and go another way if not. With us preloaded it
 * finds ours, so ours must then work: these do, with the results that the real ones have. What cannot be done another way
 * (shrink, revoke, one-sided, simulation) fails with ncclInvalidUsage and one line (ry_real_missing).
 */
#ifndef RY_PLUGIN_OLDER_H
#define RY_PLUGIN_OLDER_H

/** Fill the gaps of ry_real that can be filled. Called once, when it has been loaded. */
void ry_older_fill(void);

#endif
