/* empty.c: a library with nothing in it: what preloading any library costs, to compare librailyard.so with. */
extern int ry_empty;
int ry_empty;
