package datapath

import "time"

// TakenGrace is how long after its SYN a taken connection may still be answered although its evidence has expired since.
const TakenGrace time.Duration = takenGrace
