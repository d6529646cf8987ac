#include "launch.h"

template cudaError_t launch_loss<Float16>(const DlbCudaArgs&);
template cudaError_t launch_rescale<Float16>(const DlbCudaArgs&);
