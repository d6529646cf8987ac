#include "launch.h"

template cudaError_t launch_loss<float>(const DlbCudaArgs&);
template cudaError_t launch_rescale<float>(const DlbCudaArgs&);
