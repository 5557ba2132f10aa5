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
#define RY_HINTS 8

/** "1.23 GB": three digits, units of 1000. Returns `out`. */
const char *ry_report_bytes(double bytes, char out[16]);

/** "1.23 ms": three digits. Returns `out`. */
const char *ry_report_us(double us, char out[16]);

/* report_agreed.c: what became of the exchanges that were agreed on, in all three forms */

void ry_report_agreed_text(const struct ry_summary *s); /* nothing where there were none */
json_t *ry_report_agreed_json(const struct ry_summary *s); /* null where there were none */
double ry_report_agreed_height(const struct ry_summary *s); /* of its part of the picture, 0 where there is none */
void ry_report_agreed_svg(const struct ry_summary *s, FILE *f, double x, double y);

/* report_ways.c: equal rows, by direction, in all three forms */

void ry_report_ways_text(const struct ry_summary *s); /* nothing where none were looked for */
json_t *ry_report_ways_json(const struct ry_summary *s);
double ry_report_ways_height(const struct ry_summary *s);
void ry_report_ways_svg(const struct ry_summary *s, FILE *f, double x, double y);

/* report_local.c: what stays on its rank and node, in all three forms */

void ry_report_local_text(const struct ry_summary *s); /* nothing where nodes are not known, or there is one */
json_t *ry_report_local_json(const struct ry_summary *s); /* null there */
double ry_report_local_height(const struct ry_summary *s);
void ry_report_local_svg(const struct ry_summary *s, FILE *f, double x, double y);

/** What to look at, derived from the numbers: up to RY_HINTS lines, most important first. Returns how many. */
int ry_report_hints(const struct ry_summary *s, char hints[RY_HINTS][240]);

/** The whole report as a JSON object (docs/trace-format.md, "The report"); NULL without memory. */
json_t *ry_report_json(const struct ry_trace *trace, const struct ry_summary *summaries, int n);

/** Text in a picture, escaped; `anchor`: start, middle or end. */
void ry_report_svg_text(FILE *f, double x, double y, double size, const char *anchor, const char *color, const char *s);
#define RY_SVG_INK "#1f2933"
#define RY_SVG_FAINT "#66737f"

/** The picture of one communicator. */
void ry_report_svg(const struct ry_summary *s, FILE *f);

#endif
