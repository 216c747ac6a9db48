package table

import (
	"os"

	"golang.org/x/term"
)

// WidthOf returns how many characters a line of a terminal has; 0 if the file is none.
func WidthOf(f *os.File) int {
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return width
}

// HeightOf returns how many lines a terminal has; 0 if the file is none.
func HeightOf(f *os.File) int {
	_, height, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return height
}
