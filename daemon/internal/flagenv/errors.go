package flagenv

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
)

// Reword returns an error of pflag about the value of a flag in the form of all others: the flag, the value, and what was expected.
// It returns other errors as they are.
func Reword(err error) error {
	var invalid *pflag.InvalidValueError
	if !errors.As(err, &invalid) {
		return err
	}
	return fmt.Errorf("--%s %q: %s", invalid.GetFlag().Name, invalid.GetValue(), expected(invalid))
}

// expected says what the flag's value should have been. pflag passes on what the Go library says of numbers and the like.
func expected(invalid *pflag.InvalidValueError) string {
	switch kind := invalid.GetFlag().Value.Type(); {
	case kind == "bool":
		return "must be true or false"
	case kind == "duration":
		return "must be a duration, such as 10s"
	case strings.HasPrefix(kind, "int"):
		return "must be a whole number"
	case strings.HasPrefix(kind, "uint"):
		if bits, err := strconv.Atoi(strings.TrimPrefix(kind, "uint")); err == nil && bits < 64 {
			return fmt.Sprintf("must be a whole number from 0 to %d", uint64(1)<<bits-1)
		}
		return "must be a whole number, not negative"
	}
	cause := errors.Unwrap(invalid).Error()
	if strings.HasPrefix(cause, "slog: ") {
		return "must be debug, info, warn or error"
	}
	// Our own types repeat the value.
	return strings.TrimPrefix(cause, strconv.Quote(invalid.GetValue())+": ")
}
