/* version.c: which NCCL the library says it is. Compiled once per variant. */
extern const int ry_emu_nccl_version;
const int ry_emu_nccl_version = RY_EMU_NCCL_VERSION;
