// The functions of the CPU kernel.
#pragma once
#include "../args.h"

constexpr int64_t kDlbDone = -1;
constexpr int64_t kDlbNoMemory = -2;

// Returns kDlbDone, kDlbNoMemory, or the first row whose label is out of range. Nothing has been
// written unless it is kDlbDone.
extern "C" int64_t dlb_cpu_loss(const DlbArgs* args);

// Whether torch's thread pool (GNU OpenMP) was found in this process.
extern "C" int dlb_cpu_has_thread_pool();

// Instruction sets: 0 baseline, 1 x86-64-v3, 2 x86-64-v4. Forces one that this processor has, -1
// gives the choice back; returns the one in use from now on.
extern "C" int dlb_cpu_force_level(int level);
