/*
 * report.h: the forms of `railyard report`: text (cmd_report.c), JSON and SVG, all from the same summaries.
 */
#ifndef RY_TOOLS_REPORT_H
#define RY_TOOLS_REPORT_H

#include <stdio.h>

#include <jansson.h>

#include "record/summary.h"

#define RY_REPORT_SCHEMA "railyard-report"
#define RY_REPORT_VERSION 1
#define RY_HINTS 6

/** "1.23 GB": three digits, units of 1000. Returns `out`. */
const char *ry_report_bytes(double bytes, char out[16]);

/** What to look at, derived from the numbers: up to RY_HINTS lines, most important first. Returns how many. */
int ry_report_hints(const struct ry_summary *s, char hints[RY_HINTS][240]);

/** The whole report as a JSON object (docs/trace-format.md, "The report"); NULL without memory. */
json_t *ry_report_json(const struct ry_trace *trace, const struct ry_summary *summaries, int n);

/** The picture of one communicator. */
void ry_report_svg(const struct ry_summary *s, FILE *f);

#endif
