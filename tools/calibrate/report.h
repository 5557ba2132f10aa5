/*
 * report.h: a calibration for people: a table, and a picture of points and model.
 */
#ifndef RY_CALIBRATE_REPORT_H
#define RY_CALIBRATE_REPORT_H

#include <stdio.h>

#include "measure/calibrate.h"

void ry_calibrate_table(const struct ry_calibration *cal, const struct ry_cluster *cluster, FILE *f);
/** Time over bytes, both logarithmic: measured points with their spread, the model as lines. */
void ry_calibrate_svg(const struct ry_calibration *cal, const struct ry_cluster *cluster, FILE *f);

#endif
